"""Prompts from files, the hub and the small world; and their order, a pure function of seed and step."""

import time

import numpy as np
import pytest
import tiny
from data_files import load, small, write
from hypothesis import given
from hypothesis import strategies as st

from omniopd_jax import world
from omniopd_jax.data import prompts as data
from omniopd_jax.errors import UserError
from omniopd_jax.hf import template
from omniopd_jax.run import preflight

TOKENIZER = tiny.tokenizer()


# --- JSONL
# --------------------------------------------------------------------------------------------------------------


def test_a_prompt_is_a_string_or_messages(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    path = write(
        tmp_path, {"prompt": "1 + 1?", "answer": 2, "id": "a", "level": 3}, {"prompt": messages, "source": ["x"]}
    )
    one, two = load(path).prompts
    assert one == data.Prompt("a", ({"role": "user", "content": "1 + 1?"},), "2")
    assert two.messages == tuple(messages)
    assert (two.answer, two.solution) == (None, None)
    assert two.id != one.id


def test_ids_that_are_left_out_are_the_lines(tmp_path):
    """Stable when another prompt is added at the end, and blank lines do not shift a name in an error."""
    first = load(write(tmp_path, {"prompt": "a"}, "", "   ", {"prompt": "b"})).prompts
    more = load(write(tmp_path, {"prompt": "a"}, "", "   ", {"prompt": "b"}, {"prompt": "c"})).prompts
    assert [p.id for p in first] == [p.id for p in more[:2]]
    assert len({p.id for p in more}) == 3


def test_an_id_of_zero_is_an_id(tmp_path):
    assert [p.id for p in load(write(tmp_path, {"prompt": "a", "id": 0}, {"prompt": "b", "id": 1})).prompts] == [
        "0",
        "1",
    ]


def test_an_answer_of_zero_is_an_answer(tmp_path):
    assert load(write(tmp_path, {"prompt": "a", "answer": 0})).prompts[0].answer == "0"


GOOD = {"prompt": "a question"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "x"', "JSON"),
        ("nonsense", "JSON"),
        ("[1, 2]", "list"),
        ('"text"', "str"),
        ("3", "int"),
        ("null", "None"),
        ("{}", "`prompt`"),
        ('{"text": "x"}', "`prompt`"),
        ('{"prompt": ""}', "`prompt`"),
        ('{"prompt": "  "}', "`prompt`"),
        ('{"prompt": 3}', "`prompt`"),
        ('{"prompt": null}', "`prompt`"),
        ('{"prompt": []}', "`prompt`"),
        ('{"prompt": [{"role": "user"}]}', "`prompt`"),
        ('{"prompt": ["x"]}', "`prompt`"),
        ('{"prompt": [{"role": "user", "content": 3}]}', "`prompt`"),
        ('{"prompt": {"role": "user", "content": "x"}}', "`prompt`"),
        (b'{"prompt": "\xff\xfe"}', "line 7"),
        ('{"prompt": "x", "prompt"}', "JSON"),
        ('{"prompt": "half a pair \\ud83d"}', "line 7"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, said):
    path = write(tmp_path, *({"prompt": f"question {i}"} for i in range(5)), "", line, GOOD)
    with pytest.raises(UserError) as caught:
        load(path)
    message = str(caught.value)
    assert f"{path}, line 7" in message
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"], ids=["empty", "blank lines"])
def test_an_empty_file_is_named(tmp_path, content):
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"no prompts in .*p\.jsonl"):
        load(str(tmp_path / "p.jsonl"))


@pytest.mark.parametrize("path", ["", "/no/such/file.jsonl", "."])
def test_a_file_that_is_not_there_is_named(path):
    with pytest.raises(UserError, match=r"data\.path") as caught:
        load(path)
    assert path in str(caught.value)


def test_duplicates_by_content_are_dropped_and_counted(tmp_path):
    """The content is the messages: a string and the same as a message are one prompt, whatever else they carry."""
    same = [{"role": "user", "content": "a"}]
    loaded = load(
        write(tmp_path, {"prompt": "a", "id": 1}, {"prompt": "b"}, {"prompt": same, "answer": "x"}, {"prompt": "a "})
    )
    assert [p.messages[0]["content"] for p in loaded.prompts] == ["a", "b", "a "]
    assert loaded.duplicates == 1
    assert loaded.prompts[0].id == "1"


def test_repeated_ids_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"ids repeat in data\.path = .*prompts\.jsonl"):
        load(write(tmp_path, {"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}))


def test_an_id_like_a_line_number_is_refused_and_not_mixed_up(tmp_path):
    """`000002` is also the name that line 2 would get."""
    with pytest.raises(UserError, match="ids repeat"):
        load(write(tmp_path, {"prompt": "a", "id": "000002"}, {"prompt": "b"}))


def test_count_takes_the_first_so_many_after_duplicates(tmp_path):
    path = write(tmp_path, {"prompt": "a"}, {"prompt": "a"}, {"prompt": "b"}, "broken")
    loaded = load(path, count=2)
    assert [p.messages[0]["content"] for p in loaded.prompts] == ["a", "b"]
    assert loaded.duplicates == 1


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=8))
def test_any_text_comes_back_as_it_was(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("p")
    prompts = load(write(folder, *({"prompt": t} for t in texts))).prompts
    assert [p.messages[0]["content"] for p in prompts] == list(dict.fromkeys(texts))


# --- rendering and length
# -----------------------------------------------------------------------------------------------


def encode(path, **more):
    return data.encode(load(path), template.make(TOKENIZER), small(**more))


def test_encode_renders_with_the_generation_prompt(tmp_path):
    (prompt,) = encode(write(tmp_path, {"prompt": "1 + 1?"})).prompts
    text = TOKENIZER.decode(prompt.token_ids)
    assert text == "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"


def test_encode_passes_the_students_template_settings_on(tmp_path):
    """Qwen3's way: a prompt without thinking ends with an empty thought. The teacher's settings are not the
    student's."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template += "{% if enable_thinking is false %}{{ '<think></think>' }}{% endif %}"
    c = small()
    c.teacher.chat_template_kwargs.enable_thinking = False
    for off in (False, True):
        if off:
            c.student.chat_template_kwargs.enable_thinking = False
        chat = template.of_student(c, tokenizer)
        (prompt,) = data.encode(load(write(tmp_path, {"prompt": "1 + 1?"})), chat, c).prompts
        assert tokenizer.decode(prompt.token_ids).endswith("assistant\n" + "<think></think>" * off)


def test_overlong_prompts_are_dropped_and_counted_or_an_error(tmp_path):
    path = write(tmp_path, {"prompt": "short"}, {"prompt": "long " * 90, "id": "the-long-one"}, {"prompt": "brief"})
    kept = encode(path, max_prompt_length=64)
    assert [p.messages[0]["content"] for p in kept.prompts] == ["short", "brief"]
    assert kept.overlong == 1
    with pytest.raises(UserError, match=r"'the-long-one' has \d+ tokens.*max_prompt_length = 64.*data\.overlong"):
        encode(path, **{"max_prompt_length": 64, "data.overlong": "error"})


def test_the_limit_itself_is_allowed(tmp_path):
    path = write(tmp_path, {"prompt": "short"})
    length = len(encode(path).prompts[0].token_ids)
    assert encode(path, max_prompt_length=length).overlong == 0
    with pytest.raises(UserError, match=f"max_prompt_length = {length - 1}"):
        encode(path, max_prompt_length=length - 1)


def test_encode_keeps_what_was_counted_before(tmp_path):
    assert encode(write(tmp_path, GOOD, GOOD, {"prompt": "x"})).duplicates == 1


# --- the small world
# ----------------------------------------------------------------------------------------------------


def from_world(split, count=60, name="forks"):
    return data.load(small(**{"data.name": name}), source="world", split=split, path="", count=count).prompts


def test_the_worlds_splits_share_no_prompt():
    texts = {split: {p.messages[0]["content"] for p in from_world(split)} for split in world.SPLITS}
    assert all(len(t) == 60 for t in texts.values())
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    assert not texts["test"] & texts["validation"]


def test_a_world_prompt_has_its_answer():
    for p, problem in zip(from_world("test", 12), world.problems("forks", "test", 12), strict=True):
        assert p.answer == problem.answer
        assert world.grade(problem.right, p.answer)


def test_a_path_beside_the_small_world_is_refused(tmp_path):
    """A real model would be trained on the toy world without a word."""
    with pytest.raises(UserError, match=r"data\.path = 'p\.jsonl' is not read under data\.source = 'world'"):
        data.load(small(), source="world", split="train", path="p.jsonl", count=4)


@pytest.mark.parametrize(
    ("name", "split", "said"),
    [("nowhere", "train", r"data\.name = 'nowhere'.*forks"), ("forks", "dev", r"'dev'.*test.*train")],
)
def test_an_unknown_world_or_split_names_the_choices(name, split, said):
    with pytest.raises(UserError, match=said):
        from_world(split, name=name)


# --- the hub
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A hub that holds one data set, in memory."""
    import datasets
    import huggingface_hub

    columns = {
        "question": ["1 + 1?", "2 + 2?", "1 + 1?"],
        "solution": ["2", "4", "2"],
        "key": ["k1", "k2", "k3"],
        "level": [1, 2, 1],
    }

    def load_dataset(name, split):
        assert (name, split) == ("some/set", "train")
        return datasets.Dataset.from_dict(columns)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: None)


FIELDS = {"data.fields.prompt": "question", "data.fields.answer": "solution", "data.fields.id": "key"}


def from_hub(**more):
    c = small(**{"data.name": "some/set", **FIELDS} | more)
    return data.load(c, source="hub", split="train", path="", count=0)


def test_held_out_prompts_beside_the_hub_may_be_a_file_of_their_own(hub, tmp_path):
    """docs/your_own.md; ids that repeat are the file's, not those of data.path."""
    rows = [{"question": f"{i} + 1?", "solution": str(i + 1), "key": f"e{i}"} for i in range(3)]
    settings = {
        "data.source": "hub", "data.name": "some/set", "eval.path": write(tmp_path, *rows), "eval.num_prompts": 500,
        "eval.grader": "math",
    }  # fmt: skip
    prompts, held_out = preflight.load_prompts(small(**settings | FIELDS), None)
    assert [p.id for p in prompts.prompts] == ["k1", "k2"] and [p.id for p in held_out.prompts] == ["e0", "e1", "e2"]
    again = write(tmp_path, *rows, rows[0] | {"question": "another"}, name="again.jsonl")
    with pytest.raises(UserError, match=r"prompt ids repeat in eval\.path = '.*again\.jsonl'"):
        preflight.load_prompts(small(**settings | FIELDS | {"eval.path": again}), None)


def test_overlong_held_out_prompts_are_an_error_unless_the_run_says_otherwise(tmp_path):
    rows = [{"prompt": "1 + 1?", "answer": "2"}, {"prompt": "word " * 200, "answer": "2", "id": "the-long-one"}]
    path = write(tmp_path, *rows)
    settings = {
        "data.source": "jsonl", "data.path": path, "eval.path": path, "eval.num_prompts": 500, "eval.grader": "math",
        "max_prompt_length": 64,
    }  # fmt: skip
    made = template.make(TOKENIZER)
    with pytest.raises(UserError, match=r"'the-long-one' has .* or set eval\.overlong = 'drop'"):
        preflight.load_prompts(small(**settings), made)
    prompts, held_out = preflight.load_prompts(small(**settings, **{"eval.overlong": "drop"}), made)
    assert (len(prompts), prompts.overlong, len(held_out), held_out.overlong) == (1, 1, 1, 1)


def test_hub_columns_are_mapped(hub):
    loaded = from_hub()
    assert loaded.prompts[0] == data.Prompt("k1", ({"role": "user", "content": "1 + 1?"},), "2")
    assert loaded.duplicates == 1


def test_a_missing_prompt_column_names_those_that_are_there(hub):
    with pytest.raises(
        UserError, match=r"some/set, row 0: no field `prompt`.*question, solution, key, level; set data\.fi"
    ):
        from_hub(**{"data.fields.prompt": "prompt"})


def test_missing_answer_and_id_columns_are_allowed(hub):
    loaded = from_hub(**{"data.fields.answer": "answer", "data.fields.id": "id"})
    assert [p.answer for p in loaded.prompts] == [None, None]
    assert loaded.prompts[0].solution == "2"


def test_a_hub_that_cannot_be_reached_is_one_line_within_seconds():
    started = time.perf_counter()
    with pytest.raises(UserError, match=r"data\.name = 'no-such-org/no-such-set' \(split 'train'\)") as caught:
        from_hub(**{"data.name": "no-such-org/no-such-set"})
    assert time.perf_counter() - started < 15
    assert "\n" not in str(caught.value)
    assert "data.source" in str(caught.value), "what to set instead"


def test_the_librarys_offline_flags_are_put_back():
    import datasets
    import huggingface_hub

    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(UserError):
        from_hub(**{"data.name": "no-such-org/no-such-set"})
    assert before == (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE)


# --- the order
# ----------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**40), size=st.integers(1, 40), batch=st.integers(1, 50), first=st.integers(0, 5))
def test_every_epoch_is_a_permutation(seed, size, batch, first):
    """The endless order, cut into epochs: each has every prompt once, whatever the batch size."""
    steps = -(-3 * size // batch) + 1
    order = np.concatenate([data.batch_indices(seed, t, batch, size) for t in range(steps)])
    for epoch in range(3):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == list(range(size))
    if first < steps:
        np.testing.assert_array_equal(data.batch_indices(seed, first, batch, size), order[first * batch :][:batch])


def test_epochs_and_seeds_are_shuffled_anew():
    first, second = data.batch_indices(0, 0, 100, 100), data.batch_indices(0, 1, 100, 100)
    assert (first == second).mean() < 0.2
    assert (first == np.arange(100)).mean() < 0.2
    assert (first == data.batch_indices(1, 0, 100, 100)).mean() < 0.2


def test_the_order_depends_on_seed_and_step_alone():
    a = data.batch_indices(7, 12, 16, 100)
    np.random.seed(0)  # noqa: NPY002  a global generator must not matter
    data.batch_indices(8, 3, 16, 100)
    np.testing.assert_array_equal(data.batch_indices(7, 12, 16, 100), a)
    np.testing.assert_array_equal(np.concatenate([data.batch_indices(7, t, 8, 100) for t in (24, 25)]), a)


def test_the_order_is_the_same_in_every_release():
    """A resumed run on a new machine goes on in the same order: these numbers may only change with a note in the
    docs."""
    assert data.batch_indices(0, 0, 8, 10).tolist() == [0, 7, 8, 6, 9, 5, 1, 3]


@given(processes=st.sampled_from([1, 2, 4, 8]), step=st.integers(0, 9))
def test_slices_of_the_processes_cover_the_batch_and_are_disjoint(processes, step):
    """Every process computes the same indices; its slice is its own part of them."""
    whole = data.batch_indices(3, step, 16, 64)
    own = 16 // processes
    parts = [data.batch_indices(3, step, 16, 64)[p * own : (p + 1) * own] for p in range(processes)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert len(set(whole.tolist())) == 16


def test_a_prompt_set_smaller_than_the_batch_goes_round():
    assert sorted(data.batch_indices(0, 0, 6, 3).tolist()) == [0, 0, 1, 1, 2, 2]
