"""What a run will cost, before anything is bought: prices that are known, unknown and none; caps; the refusal."""

import json

import pytest

from omniopd_jax import config, solutions, teachers
from omniopd_jax.data import prompts
from omniopd_jax.errors import UserError
from omniopd_jax.run import estimate
from omniopd_jax.teachers import wire

OWN = "http://127.0.0.1:9/v1"
THIRD = "https://api.deepseek.com/v1"


@pytest.fixture(autouse=True)
def no_addresses(monkeypatch):
    for name in ("OPENAI_BASE_URL", "ANTHROPIC_BASE_URL", "GEMINI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def recipe(tmp_path, provider="anthropic", model="claude-haiku-4-5", **more):
    c = config.default()
    c.run_dir = str(tmp_path)
    c.update_from_flattened_dict({"teacher.provider": provider, "teacher.model": model, "num_steps": 10} | more)
    return c


def preview(*args, **more):
    return estimate.Preview(recipe(*args, **more), True)


def test_a_known_price_gives_dollars_low_to_high(tmp_path):
    p = preview(tmp_path)
    assert p.state == estimate.KNOWN and 0 < p.estimate.usd[0] < p.estimate.usd[1] < p.estimate.usd[2]
    assert f"${p.estimate.usd[1]:,.2f}" in p.text() and "10 steps to come" in p.text() and "no cap is set" in p.text()


def test_an_unknown_price_is_never_zero_dollars(tmp_path):
    text = preview(tmp_path, "openai", "gpt-of-tomorrow").text()
    assert text.count("unknown") >= 3 and "$0.00" not in text
    assert estimate.dollars(0.0, estimate.UNKNOWN) == "unknown" and estimate.dollars(1.5, estimate.KNOWN) == "$1.50"


def test_a_server_of_ones_own_has_no_price(tmp_path):
    text = preview(tmp_path, "openai", "Qwen3", **{"teacher.base_url": OWN}).text()
    assert "no price" in text and "$0.00" not in text


def test_caps_say_after_how_many_steps_they_stop_the_run(tmp_path):
    whole = preview(tmp_path)
    p = preview(tmp_path, **{"budget.usd": whole.estimate.usd[1] / 2, "budget.calls": 10**9})
    assert any("budget.usd" in line and "middle ends after 5 of 10 steps" in line for line in p.caps())
    assert any("budget.calls" in line and "high is enough" in line for line in p.caps())


def test_a_dear_run_without_a_cap_is_refused_with_the_table(tmp_path):
    with pytest.raises(UserError) as refused:
        preview(tmp_path).confirm()
    assert refused.value.exit_code == 2
    assert (
        "middle" in str(refused.value)
        and "--yes" in str(refused.value)
        and "budget.confirm_usd = 20" in str(refused.value)
    )


@pytest.mark.parametrize(
    "provider, model, more",
    [
        ("anthropic", "claude-haiku-4-5", {"budget.usd": 5.0}),
        ("anthropic", "claude-haiku-4-5", {"budget.calls": 100}),
        ("anthropic", "claude-haiku-4-5", {"budget.confirm_usd": 1e9}),
        ("anthropic", "claude-haiku-4-5", {"prompts_per_step": 1, "num_steps": 1}),
        ("anthropic", "claude-haiku-4-5", {"teacher.replay": "only"}),
        ("openai", "gpt-of-tomorrow", {"num_steps": 1, "prompts_per_step": 4}),
        ("openai", "gpt-of-tomorrow", {"budget.tokens": 10**9}),
        ("openai", "Qwen3", {"teacher.base_url": OWN}),
        ("openai", "Qwen3", {"teacher.base_url": "http://HOST:8000/v1"}),
        ("openai", "Qwen3", {"teacher.base_url": THIRD, "teacher.price_input": 0.0, "teacher.price_output": 0.0}),
        ("local", "folder", {}),
    ],
)
def test_these_start_without_being_asked(tmp_path, provider, model, more):
    preview(tmp_path, provider, model, **more).confirm()


@pytest.mark.parametrize(
    "model, more, said",
    [
        ("Qwen3", {"teacher.base_url": OWN, "teacher.price_input": 9.0, "teacher.price_output": 9.0}, "estimate, \\$"),
        ("m", {"teacher.base_url": THIRD, "teacher.price_input": 9.0, "teacher.price_output": 9.0}, "estimate, \\$"),
        ("gpt-4.1-mini", {"teacher.base_url": THIRD}, "estimate, [0-9,]+ million tokens at an unknown price, is above"),
        ("gpt-of-tomorrow", {}, "estimate, [0-9,]+ million tokens at an unknown price, is above"),
    ],
)
def test_these_are_asked_about_first(tmp_path, monkeypatch, model, more, said):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-a-test-0123456789")
    with pytest.raises(UserError, match=said) as refused:
        preview(tmp_path, "openai", model, **more).confirm()
    assert "--yes" in str(refused.value) and "$0.00" not in str(refused.value)


def test_whole_solutions_are_counted_once_a_prompt(tmp_path):
    def calls(**more):
        c = recipe(tmp_path, "anthropic", "claude-haiku-4-5", **{"objective.name": "sft", "num_generations": 1} | more)
        return estimate.previews(c, True, solutions.bought(c))[0].estimate.calls

    assert calls(prompts_per_step=8, num_steps=10)[0] == 80
    few = {"prompts_per_step": 8, "num_steps": 10, "data.num_prompts": 20}
    assert calls(**few) == pytest.approx((20, 20 * 1.02, 20 * 1.1))


def test_prompts_with_solutions_of_their_own_are_seen_before_anything_is_asked(tmp_path):
    c = recipe(tmp_path, "anthropic", "claude-haiku-4-5")
    for row, has in (({"prompt": "a", "solution": "b"}, True), ({"prompt": "a"}, False), ({"x": 1}, False)):
        (tmp_path / "p.jsonl").write_text(json.dumps(row))
        c.data.source, c.data.path = "jsonl", str(tmp_path / "p.jsonl")
        assert prompts.first_has_solution(c) == has
    c.data.path = str(tmp_path / "nothing")
    assert not prompts.first_has_solution(c)
    c.data.source = "world"
    assert not prompts.first_has_solution(c) and prompts.count_known(c) == 4096


def test_an_unknown_price_is_not_asked_about_where_no_key_could_buy(tmp_path, monkeypatch):
    """The run's own checks then name the key, and the model and the data that are missing too."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    preview(tmp_path, "openai", "gpt-of-tomorrow").confirm()


@pytest.mark.parametrize(
    "provider, url",
    [
        ("openai", THIRD),
        ("openai", "https://name.openai.azure.com/openai/v1"),
        ("openai", "https://api.openai.com.example.net/v1"),
        ("anthropic", "https://gateway.example.com"),
        ("gemini", "https://gateway.example.com"),
    ],
)
def test_the_price_of_another_host_is_unknown_until_it_is_told(tmp_path, provider, url, monkeypatch):
    """Also of a model that the table has: its price is the provider's own."""
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-0123456789")
    model = {"openai": "gpt-4.1-mini", "anthropic": "claude-haiku-4-5", "gemini": "gemini-3.8-flash"}[provider]
    c = recipe(tmp_path, provider, model, **{"teacher.base_url": url})
    p = estimate.Preview(c, True)
    assert p.state == estimate.UNKNOWN and "$0.00" not in p.text() and "a server of your own has" not in p.text()
    teacher = teachers.make(c)
    assert teacher.metrics()["teacher/price_known"] == 0 and "unknown" in teacher.forecast()
    c.teacher.price_input, c.teacher.price_output = 1.0, 2.0
    assert estimate.Preview(c, True).state == estimate.KNOWN
    assert teachers.make(c).metrics()["teacher/price_known"] == 1


@pytest.mark.parametrize(
    "url, own",
    [
        ("http://HOST:8000/v1", True), ("http://models.example.com/v1", True), ("https://localhost:8000/v1", True),
        ("https://127.0.0.1/v1", True), ("https://[::1]:8000/v1", True), ("https://10.1.2.3/v1", True),
        ("https://192.168.0.9/v1", True), ("https://169.254.1.1/v1", True), ("https://[fe80::1]/v1", True),
        ("https://gpu-node/v1", True), ("https://vllm.default.svc.cluster.local/v1", True),
        ("https://gpu.internal./v1", True), ("https://8.8.8.8/v1", False), ("https://api.deepseek.com/v1", False),
        ("https://internal.example.com/v1", False), ("https://api.openai.com/v1", False),
    ],
)  # fmt: skip
def test_a_server_of_ones_own_is_known_by_its_address(url, own):
    assert wire.own_server(url) is own


def test_steps_that_are_done_are_not_paid_again(tmp_path):
    whole = preview(tmp_path)
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    half = preview(tmp_path)
    assert half.steps == 5 and half.estimate.usd[1] == pytest.approx(whole.estimate.usd[1] / 2)


def test_an_objective_without_a_teacher_buys_nothing(tmp_path):
    p = estimate.Preview(recipe(tmp_path), False)
    assert p.estimate is None and "nothing is bought" in p.text()
    p.confirm()
