"""The model card of an export and its upload, against a hub on loopback."""

import base64
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import types

import pytest
import report_runs as runs
import tiny

from omniopd_jax import export, objective
from omniopd_jax.errors import UserError
from omniopd_jax.run import card

TOKEN = "hf_" + "x" * 34


def front(text: str) -> dict:
    """The fields that the hub reads."""
    lines = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1].split("\n")
    return {k: json.loads(v) for k, v in (line.split(": ", 1) for line in lines)}


@pytest.fixture
def run(tmp_path):
    cfg = runs.settings(
        **{"student.path": "Qwen/Qwen3-1.7B", "teacher.provider": "openai", "teacher.model": "Qwen3-32B"}
    )
    return runs.write(tmp_path / "run", cfg=cfg)


def test_a_card_has_base_teacher_method_settings_results_cost_and_licence(run, tmp_path):
    text = card.write(tmp_path, run, name="me/model", adapter=False).read_text()
    fields = front(text)
    assert fields["base_model"] == "Qwen/Qwen3-1.7B" and fields["base_model_relation"] == "finetune"
    assert fields["library_name"] == "transformers" and "omniopd" in fields["tags"] and fields["license"] == "other"
    parts = (
        "# me/model",
        "`Qwen3-32B` (openai)",
        "2606.01476",
        "20 of 20",
        "37.5% and 75.0%",
        "$0.40",
        "kl_coef` | `0.1`",
    )
    for part in parts:
        assert part in text, part
    assert "licence" in text and "teacher's terms" in text


def test_an_adapter_s_card_says_so(run, tmp_path):
    fields = front(card.write(tmp_path, run, name="me/model", adapter=True).read_text())
    assert (fields["library_name"], fields["base_model_relation"]) == ("peft", "adapter")


def test_an_earlier_checkpoint_does_not_carry_the_last_one_s_results(run, tmp_path):
    text = card.write(tmp_path, run, name="me/model", adapter=False, step=10).read_text()
    assert "10 of 20" in text and "not measured at this step" in text and "75.0%" not in text


def test_a_run_that_did_not_score_its_base_says_how_it_ended(run, tmp_path):
    summary = json.loads((run / "summary.json").read_text()) | {"accuracy_before": None}
    (run / "summary.json").write_text(json.dumps(summary))
    text = card.write(tmp_path, run, name="me/model", adapter=False).read_text()
    assert "accuracy after | 75.0%" in text and "before" not in text


def test_a_base_folder_gives_its_licence_and_no_path_of_this_machine(tmp_path):
    base = tmp_path / "models" / "base"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base\n")
    cfg = runs.settings(**{"student.path": str(base), "data.path": f"{tmp_path}/prompts.jsonl"})
    text = card.write(tmp_path, runs.write(tmp_path / "run", cfg=cfg), name="me/model", adapter=False).read_text()
    assert front(text)["license"] == "apache-2.0" and "`apache-2.0`" in text
    assert str(tmp_path) not in text and "`base`" in text and "prompts.jsonl" in text


@pytest.mark.parametrize(
    "said, wanted",
    [
        ("license:\n- apache-2.0", {"license": "apache-2.0"}),
        ("license:\nlibrary_name: x", {"license": "other", "license_name": "see-base-model"}),
        ("license: other\nlicense_name: gemma\nlicense_link: https://a.b/c",
         {"license": "other", "license_name": "gemma", "license_link": "https://a.b/c"}),
        ("license: [", {"license": "other", "license_name": "see-base-model"}),
    ],
)  # fmt: skip
def test_a_licence_is_read_as_the_hub_reads_it(tmp_path, said, wanted):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text(f"---\n{said}\n---\n# base\n")
    cfg = runs.settings(**{"student.path": str(tmp_path / "base")})
    text = card.write(tmp_path, runs.write(tmp_path / "run", cfg=cfg), name="me/model", adapter=False).read_text()
    assert {key: value for key, value in front(text).items() if key.startswith("license")} == wanted


@pytest.mark.parametrize(
    "written, shown", [("Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B"), ("/home/alice/secret/ck-500", None)]
)
def test_where_a_base_was_read_from_is_its_hub_name_or_nothing(tmp_path, written, shown):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"_name_or_path": written}))
    cfg = runs.settings(**{"student.path": str(tmp_path / "base")})
    text = card.write(tmp_path, runs.write(tmp_path / "run", cfg=cfg), name="me/model", adapter=False).read_text()
    assert front(text).get("base_model") == shown and "alice" not in text


def test_a_local_teacher_costs_nothing(tmp_path):
    rows = [runs.row(t, **{"teacher/cost_usd": 0}) for t in range(20)]
    folder = runs.write(tmp_path / "run", cfg=runs.settings(), rows=rows)
    (folder / "summary.json").write_text('{"step": 20, "teacher/cost_usd": 0.0, "teacher/calls": 5}')
    assert "| teacher cost | none; 5 requests" in card.write(tmp_path, folder, name="a/b", adapter=False).read_text()


def test_an_unknown_price_and_hostile_names_stay_what_they_are(tmp_path):
    cfg = runs.settings(**{"teacher.provider": "openai", "teacher.model": "a`|\n---\n<script>\x1b[31m"})
    rows = [runs.row(t, **{"teacher/price_known": 0, "teacher/cost_usd": 0}) for t in range(20)]
    folder = runs.write(tmp_path / "run", cfg=cfg, rows=rows)
    text = card.write(tmp_path, folder, name="me/model", adapter=False).read_text()
    assert "unknown price" in text and "$0.00" not in text
    (line,) = [x for x in text.split("\n") if x.startswith("| teacher |")]
    assert line.count("`") == 2 and "\x1b" not in line and "\\|" in line


def test_several_teachers_are_all_named_and_their_unknown_price_is_no_zero(tmp_path):
    several = {"teachers": {"math": {"provider": "openai", "model": "m"}, "code": {"provider": "local", "model": "c"}}}
    rows = [runs.row(t, **{"teacher/price_known": 0, "teacher/cost_usd": 0}) for t in range(20)]
    folder = runs.write(tmp_path / "run", cfg=runs.settings() | several, rows=rows)
    text = card.write(tmp_path, folder, name="me/model", adapter=False).read_text()
    assert "| teacher | `m` (openai), `c` (local) |" in text and "unknown price" in text


def card_of(folder, **values) -> dict[str, str]:
    """The card's first table for a run with these settings."""
    folder.mkdir()
    text = card.write(folder, runs.write(folder / "run", cfg=runs.settings(**values)), name="a/b", adapter=False)
    return dict(re.findall(r"^\| ([a-z ]+) \| (.*) \|$", text.read_text(), re.M))


def test_method_and_teacher_come_from_the_objectives_records(tmp_path, monkeypatch):
    """Of any objective, one that somebody adds by its line too."""
    mine = objective.Objective(objective.constant, "a method of mine", chunks=True)
    monkeypatch.setitem(objective.OBJECTIVES, "mine", mine)
    for name, own in objective.OBJECTIVES.items():
        table = card_of(tmp_path / name, **{"objective.name": name})
        assert own.about and table["method"] == own.about
        assert (table["teacher"] == "none") == (name in ("mine", "constant", "grpo")) == (not own.asks)
    mixed = card_of(tmp_path / "mix", **{"objective.mix": {"grpo": 1.0, "mine": 1.0}})
    assert (
        mixed["method"] == "GRPO with a rule-based reward, no teacher; a method of mine" and mixed["teacher"] == "none"
    )
    gone = card_of(tmp_path / "gone", **{"objective.name": "of_another_version"})
    assert gone["method"] == "of_another_version" and gone["teacher"] != "none"


@pytest.mark.parametrize("name", ["model", "a/b/c", "a b/c", "../x", ""])
def test_a_name_that_is_none_is_refused_before_anything_is_exported(name):
    with pytest.raises(UserError, match="OWNER/MODEL"):
        card.check(name)


class Hub(http.server.BaseHTTPRequestHandler):
    """What an upload of small files needs of the hub's API."""

    def log_message(self, *args):
        """Nothing at the terminal."""

    def answer(self, body, code=200):
        body = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": f"bad token {self.headers.get('Authorization')}"}, 401)
        if "/tree/" in self.path:
            old = (
                "model-00001-of-00002.safetensors",
                "model.safetensors.index.json",
                "adapter_config.json",
                "notes.md",
            )
            return self.answer([{"type": "file", "path": p, "oid": "1" * 40, "size": 1} for p in old])
        about = (
            {"name": "me", "type": "user", "auth": {}} if "whoami" in self.path else {"id": "me/model", "siblings": []}
        )
        return self.answer(about)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.path, body))
        if self.path.endswith("/repos/create"):
            return self.answer({"url": f"http://{self.headers['Host']}/me/model", "name": "me/model", "id": "me/model"})
        if "/preupload/" in self.path:
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer({"files": [{"path": f["path"]} | plain for f in json.loads(body)["files"]]})
        where = f"http://{self.headers['Host']}/me/model/commit/1"
        return self.answer({"commitUrl": where, "commitOid": "1" * 40, "pullRequestUrl": None})


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def push(hub, folder, token=TOKEN):
    code = (
        "import sys\nfrom omniopd_jax.errors import UserError\nfrom omniopd_jax.run import card\n"
        "try:\n    card.check('me/model')\n    print(card.push(sys.argv[1], 'me/model'))\n"
        "except UserError as error:\n    print('refused:', error)\n"
    )
    where = f"http://127.0.0.1:{hub.server_address[1]}"
    env = tiny.environment(HF_ENDPOINT=where, HF_TOKEN=token, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


@pytest.mark.slow
def test_a_folder_is_uploaded_to_a_private_repository(hub, run, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    card.write(folder, run, name="me/model", adapter=False)
    said, log = push(hub, folder)
    assert said.endswith("/me/model") and TOKEN not in said + log
    created = next(json.loads(body) for path, body in hub.seen if path.endswith("/repos/create"))
    assert created["name"] == "model" and (created.get("private") is True or created.get("visibility") == "private")
    commit = next(body for path, body in hub.seen if "/commit/" in path)
    sent = [x["value"] for x in map(json.loads, commit.splitlines()) if x["key"] == "file"]
    files = {x["path"]: base64.b64decode(x["content"]) for x in sent}
    assert files["model.safetensors"] == b"weights" and files["README.md"].startswith(b"---\nlibrary_name")
    gone = {x["value"]["path"] for x in map(json.loads, commit.splitlines()) if x["key"] == "deletedFile"}
    assert gone == {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_config.json"}


@pytest.mark.slow
def test_an_adapter_is_uploaded_without_the_way_to_its_base(hub, run, tmp_path):
    folder, base = tmp_path / "out", tmp_path / "secret" / "base"
    folder.mkdir()
    base.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "base_model_name_or_path": str(base)}))
    push(hub, folder)
    commits = [body for path, body in hub.seen if "/commit/" in path]
    sent = [x["value"] for body in commits for x in map(json.loads, body.splitlines()) if x["key"] == "file"]
    [config] = [base64.b64decode(x["content"]) for x in sent if x["path"] == "adapter_config.json"]
    assert json.loads(config) == {"r": 2, "base_model_name_or_path": "base"}
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


@pytest.mark.slow
def test_a_refused_token_is_one_line_without_the_token(hub, tmp_path):
    said, log = push(hub, tmp_path, token="hf_" + "y" * 34)
    assert said.startswith("refused: --push_to_hub=me/model") and "\n" not in said
    assert "y" * 34 not in said + log and not [p for p, _ in hub.seen if "commit" in p]


def test_a_folder_s_files_can_be_read_by_others_whatever_the_umask(tmp_path):
    """Whoever serves a model may be another user than the one who exported it."""
    before = os.umask(0o077)
    try:
        student, _ = tiny.make_folders(tmp_path)
    finally:
        os.umask(before)
    files = {p.name: p.stat().st_mode & 0o777 for p in student.iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= files.keys() and set(files.values()) == {0o644}
    assert student.stat().st_mode & 0o777 == 0o755


def test_an_export_of_a_run_that_goes_on_names_the_checkpoint_that_it_holds(run, tmp_path, monkeypatch):
    """Not the steps that the run has written since."""
    asked, given = [], {"checkpoint": str(run), "out": str(tmp_path / "out"), "push_to_hub": "", "adapter": False,
                        "dtype": "bfloat16"}  # fmt: skip
    (run / "summary.json").unlink()
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(export.checkpoint, "saved_params", lambda _: types.SimpleNamespace(step=10))
    monkeypatch.setattr(export, "export", lambda source, out, **_: asked.append(source) or out)
    monkeypatch.setattr(export.cli, "setup_jax", lambda: None)
    monkeypatch.setattr(export.flags, "FLAGS", {k: types.SimpleNamespace(value=v) for k, v in given.items()})
    assert export.main(["export"]) == 0
    assert asked == [f"{run}/checkpoints/10"] and "10 of 20" in (tmp_path / "out" / "README.md").read_text()
