import json
import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.small_world import build
from benchmarks.small_world import cells as small_world
from omniopd_jax import model, step, world
from omniopd_jax.errors import UserError
from omniopd_jax.world import forks

STEP = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")
LEAST = {"train": 8192, "validation": 512, "test": 1024}


@pytest.fixture(scope="module")
def test_split():
    return world.problems("forks", "test", 1200)


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text for pair in world.corpus("forks", "student", 1500, 0) for text in pair]
    return world.train_tokenizer(texts, 560)


def steps_of(solution):
    return [(int(x), op, int(y), int(z)) for x, op, y, z in STEP.findall(solution)]


def assert_computes(solution, answer=None):
    """Every step is right, a step's number is the problem's or an earlier result, the last is the answer."""
    steps = steps_of(solution)
    assert steps and solution.count("=") == len(steps)
    for x, op, y, z in steps:
        assert forks.OPS[op](x, y) == z and 1 <= z <= 99
    assert solution.endswith(f"The answer is {steps[-1][3]}.")
    assert answer is None or str(steps[-1][3]) == answer


def test_at_least_five_kinds_and_shares_for_each():
    assert len(world.FORKS) >= 5
    assert set(world.WRONG_SHARE) == set(world.FORKS)
    assert sum(world.SPLITS.values()) == 100


@pytest.mark.parametrize("split", world.SPLITS)
def test_deterministic_distinct_and_prefix_stable(split):
    found = world.problems("forks", split, LEAST[split], seed=3)
    assert found == world.problems("forks", split, LEAST[split], seed=3)
    assert found[:100] == world.problems("forks", split, 100, seed=3)
    assert [p.prompt for p in found[:100]] != [p.prompt for p in world.problems("forks", split, 100, seed=4)]
    assert len({p.prompt for p in found}) == len({p.id for p in found}) == len(found) == LEAST[split]
    assert {p.fork for p in found} == set(world.FORKS)


def test_known_problem():
    """A change here changes every committed checkpoint's data: make it on purpose."""
    p = next(p for p in world.problems("forks", "test", 600) if p.fork == "order")
    a, b, c = p.numbers
    assert p.right == (
        f"First fill the bags: {b} * {c} = {b * c}. Then add the rest: {a} + {b * c} = {a + b * c}. "
        f"The answer is {a + b * c}."
    )
    assert world.split_of("order", (3, 5, 5)) == "test" and world.split_of("left", (23, 5, 3)) == "test"


def test_splits_are_disjoint_by_content():
    contents = {
        split: {(p.fork, p.numbers) for p in world.problems("forks", split, LEAST[split])} for split in world.SPLITS
    }
    for split, found in contents.items():
        assert {world.split_of(*content) for content in found} == {split}
    corpus = {prompt for role in world.ROLES for prompt, _ in world.corpus("forks", role, 5000, 1)}
    held_out = {p.prompt for split in ("validation", "test") for p in world.problems("forks", split, 512)}
    assert not corpus & held_out


def test_worlds_share_their_problems(test_split):
    for name in world.WORLDS:
        assert [p.prompt for p in world.problems(name, "test", 1200)] == [p.prompt for p in test_split]


def test_both_strategies_compute_and_disagree(test_split):
    for p in test_split:
        assert_computes(p.right, p.answer)
        assert_computes(p.wrong)
        assert world.extract_answer(p.wrong) != p.answer
        assert p.right.startswith("First ") and p.wrong.startswith("First ")
        assert p.right.split()[1] != p.wrong.split()[1]
        assert world.grade(p.terse, p.answer) and len(p.terse) < len(p.right)
        assert {str(n) for n in p.numbers if isinstance(n, int)} <= set(re.findall(r"\d+", p.prompt))


def test_terse_is_the_last_step_of_the_right_solution(test_split):
    for p in test_split:
        expression, result = re.fullmatch(r"It is ([\d +*-]+) = (\d+)\. The answer is \d+\.", p.terse).groups()
        assert eval(expression) == int(result) == int(p.answer)  # digits and operators only, see the pattern
        assert f": {expression} = {result}. The answer is" in p.right


def test_fork_is_visible_to_edit_similarity(test_split, tokenizer):
    from rapidfuzz.distance import Levenshtein

    for p in test_split[:300]:
        right, wrong = tokenizer.encode(p.right), tokenizer.encode(p.wrong)
        fork = next(i for i, (a, b) in enumerate(zip(right, wrong)) if a != b)
        chunk = [tokenizer.decode(ids[fork : fork + 8]) for ids in (right, wrong)]
        assert fork <= 2 and len(wrong) >= fork + 8
        assert Levenshtein.normalized_similarity(*chunk) < 0.55


def test_student_mixes_strategies_near_the_constants():
    texts = world.corpus("forks", "student", 12000, 5)
    assert texts == world.corpus("forks", "student", 12000, 5)
    problems = {p.prompt: p for p in by_prompt("student", 12000, 5)}
    taken = {fork: [] for fork in world.FORKS}
    for prompt, solution in texts:
        p = problems[prompt]
        assert solution in (p.right, p.wrong)
        taken[p.fork].append(solution == p.wrong)
    for fork, share in world.WRONG_SHARE.items():
        assert abs(np.mean(taken[fork]) - share) < 0.05  # 2,000 a kind: 4.5 standard errors
    share = dict.fromkeys(world.FORKS, 1.0)
    assert all(s == problems[p].wrong for p, s in world.corpus("forks", "student", 600, 5, wrong_share=share))


def by_prompt(role, count, seed):
    draws = world._draws("train", count, seed, 1 + world.ROLES.index(role))
    return [world._problem("forks", *draw) for draw in draws]


def test_teacher_is_right_and_terse_only_in_style():
    problems = by_prompt("teacher", 3000, 2)
    for name in ("forks", "slips"):
        assert world.corpus(name, "teacher", 3000, 2) == [(p.prompt, p.right) for p in problems]
    style = world.corpus("style", "teacher", 3000, 2)
    assert all(s in (p.right, p.terse) for (_, s), p in zip(style, problems))
    assert abs(np.mean([s == p.terse for (_, s), p in zip(style, problems)]) - world.TERSE_SHARE) < 0.04
    assert world.corpus("style", "student", 300, 2) == world.corpus("forks", "student", 300, 2)
    assert all(s == p.terse for (_, s), p in zip(world.corpus("style", "teacher", 300, 2, terse_share=1.0), problems))


def test_slips_are_single_digits_carried_to_the_answer():
    hard = slipped = clean = 0
    texts = world.corpus("slips", "student", 6000, 7)
    for (_, solution), p in zip(texts, by_prompt("student", 6000, 7)):
        steps, right = steps_of(solution), steps_of(p.right)
        assert [s[1] for s in steps] == [s[1] for s in right] and solution.startswith(p.right.split(":")[0])
        prev = None
        for (x, op, y, z), (rx, _, ry, _) in zip(steps, right):
            # a number is what the right solution has there, or the (perhaps slipped) result of the step before
            assert x in (rx, prev) and y in (ry, prev)
            wrong = world.slipped_result(x, op, y)
            hard += wrong is not None
            if z != forks.OPS[op](x, y):
                slipped += 1
                true = str(forks.OPS[op](x, y))
                assert z == wrong and len(true) == len(str(z))
                assert sum(a != b for a, b in zip(true, str(z))) == 1
            assert 1 <= z <= 99
            prev = z
        assert solution.endswith(f"The answer is {prev}.")
        clean += world.grade(solution, p.answer)
    assert abs(slipped / hard - world.SLIP_SHARE) < 0.04
    assert 0.3 < clean / len(texts) < 0.8
    assert all(
        s == p.right
        for (_, s), p in zip(world.corpus("slips", "student", 300, 7, slip_share=0.0), by_prompt("student", 300, 7))
    )


def test_slipped_result():
    assert world.slipped_result(18, "+", 7) == 15
    assert world.slipped_result(23, "-", 8) == 25
    assert world.slipped_result(7, "*", 7) == 40  # 49 -> 40
    for easy in ((2, "+", 3), (8, "+", 5), (28, "-", 5), (13, "-", 8), (3, "*", 4)):
        assert world.slipped_result(*easy) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 17.", "17"),
        ("The answer is 17", "17"),
        ("The answer is 3. No: The answer is 4. Thanks!", "4"),
        ("The answer is 3. The answer is", None),
        ("The answer is seven.", None),
        ("17", None),
        ("", None),
        ("The answer is ١٧.", None),  # Arabic-Indic digits are no answer of this world
        ("The answer is １７.", None),  # nor are full-width ones
        ("The answer is -5.", "-5"),
        ("The answer is 17.5.", "17.5"),
        ("The answer is\n 8<|im_end|>", "8"),
        ("The answer is " + "9" * 50_000, "9" * 50_000),
    ],
)
def test_extract_answer(text, answer):
    assert world.extract_answer(text) == answer


def test_grade():
    assert world.grade("The answer is 17.", "17") and world.grade("The answer is 017.", " 17 ")
    assert not world.grade("The answer is 1", "17") and not world.grade("17", "17")
    assert not world.grade("The answer is 170.", "17") and not world.grade("The answer is -17.", "17")
    assert not world.grade("The answer is " + "9" * 50_000, "17")
    assert world.grade("The answer is -0.", "0")


def test_tokenizer_words_and_digits(tokenizer):
    assert len(tokenizer) <= 560
    words = {w for pair in world.corpus("forks", "student", 600, 0) for t in pair for w in re.findall(r" [A-Za-z]+", t)}
    assert {w for w in words if len(tokenizer.encode(w)) > 1} == set()
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a: 31 + 4")) == ["a", ":", "Ġ3", "1", "Ġ+", "Ġ4"]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    for special in world.SPECIALS:
        assert len(tokenizer.encode(special)) == 1


@given(text=st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_tokenizer_round_trip(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text", ["a , b . 'x' n't", "  two  spaces \n\n tab\t", "é漢字🙂", "<|im_end|> x <|im_start|>", "\r\n"]
)
def test_tokenizer_round_trip_of_hard_cases(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("with_config", [False, True])
def test_tokenizer_saves_and_loads(tokenizer, tmp_path, with_config):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    if with_config:  # as in a model's folder, where the model type might choose another class
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 560})
        )
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.eos_token, loaded.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
    assert loaded.clean_up_tokenization_spaces is False
    for text in ("First add 12 + 7 = 19.", "  x  ", "漢 🙂 n't .", "\u0301e <|im_end|>\n"):
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    assert loaded.chat_template == world.CHAT_TEMPLATE


def test_tokenizer_is_deterministic(tokenizer):
    texts = [text for pair in world.corpus("forks", "student", 1500, 0) for text in pair]
    assert world.train_tokenizer(texts, 560).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_chat_template(tokenizer):
    messages = [{"role": "user", "content": "Hi {x}"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nHi {x}<|im_end|>\n<|im_start|>assistant\n"
    )
    messages = [{"role": "system", "content": "S"}, *messages, {"role": "assistant", "content": "A"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi {x}<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: world.problems("fork", "train", 1), "forks, slips, style"),
        (lambda: world.problems("forks", "dev", 1), "test, train, validation"),
        (lambda: world.problems("forks", "test", 10**9), "allowed: 0 to"),
        (lambda: world.problems("forks", "test", -1), "allowed: 0 to"),
        (lambda: world.problems("forks", "test", 1, seed=-1), "allowed: 0 and up"),
        (lambda: world.capacity("dev"), "test, train, validation"),
        (lambda: world.corpus("fork", "student", 1, 0), "forks, slips, style"),
        (lambda: world.corpus("forks", "pupil", 1, 0), "student, teacher"),
        (lambda: world.corpus("forks", "student", 10**9, 0), "allowed: 0 to"),
        (lambda: world.corpus("forks", "student", 1, -1), "allowed: 0 and up"),
        (lambda: world.corpus("forks", "student", 1, 0, wrong_share={"order": 1.0}), "quantity"),
        (lambda: world.train_tokenizer([], 100), "259"),
    ],
)
def test_errors_name_what_is_allowed(call, named):
    with pytest.raises(UserError, match=re.escape(named)) as error:
        call()
    assert "\n" not in str(error.value)


def test_full_split_has_no_prompt_twice():
    prompts = [p.prompt for p in world.problems("forks", "validation", world.capacity("validation"))]
    assert len(set(prompts)) == len(prompts)
    assert all(world.capacity(split) >= least for split, least in LEAST.items())


# --- the checkpoints ------------------------------------------------------------------------------------------------


def test_worlds_share_a_model_only_where_its_corpus_is_the_same():
    """slips' teacher is forks' teacher, style's student forks' student; the other two learn texts of their own."""
    for role, same, other in (("teacher", "slips", "style"), ("student", "style", "slips")):
        forks_texts, same_texts, other_texts = (world.corpus(w, role, 2000, 0) for w in ("forks", same, other))
        assert forks_texts == same_texts and forks_texts != other_texts
        owners = {small_world.CHECKPOINTS[w][world.ROLES.index(role)] for w in ("forks", same)}
        assert (
            owners == {f"forks/{role}"} and small_world.CHECKPOINTS[other][world.ROLES.index(role)] == f"{other}/{role}"
        )


def test_the_checkpoints_in_git_are_whole_small_and_speak_one_tokenizer():
    folders = {folder for which in world.WORLDS for folder in small_world.checkpoints(which)}
    assert len(folders) == 4 and len({(folder / "tokenizer.json").read_bytes() for folder in folders}) == 1
    assert sum(f.stat().st_size for folder in folders for f in folder.iterdir()) < 5e6
    for folder in folders:
        card = json.loads((folder / "build.json").read_text())
        assert folder.parts[-2:] == (card["world"], card["role"])
        right = card["test_accuracy"]
        assert right > 0.95 if card["role"] == "teacher" else 0.2 < right < 0.5, folder


@pytest.mark.slow
def test_a_build_learns_its_corpus(tokenizer):
    """Eight updates of a small model, by the real command's own step: the loss falls."""
    role = build.Role(32, 32, 1, 8, 128, 1e-2)
    model_cfg = build.model_config(role, 560)
    corpus = build.encode_corpus(tokenizer, world.corpus("style", "teacher", role.texts, 0))
    cfg = build.sft_config(role, role.steps)
    start = model.init(jax.random.key(0), model_cfg)
    end = jax.device_put(build.train(model_cfg, cfg, corpus, 0))
    token_BL, prompt_length_B, length_B = corpus
    T = int(length_B.max())
    real_BT = np.arange(T)[None] < length_B[:, None]
    losses = []
    for params in (start, end):
        stats = step.score(params, token_BL, prompt_length_B, T, model_cfg=model_cfg, block=4096, micro_batches=1)
        losses.append(-float(np.asarray(stats.logp_BT)[real_BT].mean()))
    assert losses[1] < losses[0] - 0.3, losses
