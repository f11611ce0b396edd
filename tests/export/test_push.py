"""`push`: the real client against a hub on this machine; what is uploaded, and what never is."""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers.hub_server import Hub, serving
from helpers.trained_runs import PLANS, make_run
from sparse_llm_ft.cli.main import main
from sparse_llm_ft.config import RunConfig, parse_config
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.export.export import write_export
from sparse_llm_ft.export.hub import check_name, check_repository, upload
from sparse_llm_ft.export.model_card import metadata_of, model_card
from sparse_llm_ft.export.options import ExportOptions
from sparse_llm_ft.export.sanitize import public_settings
from sparse_llm_ft.export.serve_lines import serve_lines
from sparse_llm_ft.inference.trained_run import read_run
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter
from sparse_llm_ft.serving.commands import serve_command

TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyz012345"
IDS = torch.tensor([[1, 5, 9, 12, 7, 3]])


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub()) as running:
        yield running


@pytest.fixture
def here(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """The hub, as this process's client sees it, which is logged in by the environment."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def command(hub: Hub, home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`sparse-llm-ft push` in a process of its own."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-m", "sparse_llm_ft.cli.main", "push", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | settings | environment,
    )


@pytest.mark.parametrize("lfs", [True, pytest.param(False, marks=pytest.mark.long)])
def test_an_upload_is_the_export_with_card_and_settings(
    lfs: bool, hub: Hub, settings: dict, loud_folder: Path, tmp_path: Path
) -> None:
    """By way of LFS, and by way of the commit; what was uploaded loads in PEFT and computes the same."""
    hub.lfs = lfs
    model = make_run(settings, PLANS["ranked"])
    before = set(Path(settings["output_dir"]).iterdir())
    environment = {"HF_HUB_DISABLE_XET": "1"} if lfs else {}
    result = command(hub, tmp_path / "home", settings["output_dir"], "me/tiny", "--private", **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{hub.url}/me/tiny\n"
    assert hub.created[0]["name"] == "tiny" and hub.created[0]["organization"] == "me"
    assert "private" in (hub.created[0].get("visibility"), "private" * bool(hub.created[0].get("private")))
    assert set(hub.files) == {"README.md", "config.yaml", "adapter_config.json", "adapter_model.safetensors"}
    assert bool(hub.objects) == lfs and hub.tokens <= {f"Bearer {TOKEN}", None}
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name, content in hub.files.items():
        (folder / name).write_bytes(content)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(loud_folder), folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(input_ids=IDS).logits, rtol=1e-5, atol=1e-4)
    assert set(Path(settings["output_dir"]).iterdir()) == before, "nothing stays behind"
    assert TOKEN not in result.stdout + result.stderr


@pytest.mark.parametrize("to", ["peft", "merged", "native"])
def test_a_dry_run_says_what_would_be_uploaded_and_gives_nothing_of_this_machine_away(
    to: str, settings: dict, capsys, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    settings["deepspeed"] = {"wandb": {"enabled": False, "team": "somebody"}, "zero_stage": 1}
    make_run(settings, PLANS["grouped" if to != "merged" else "masked"])
    main(["push", settings["output_dir"], "me/tiny", "--to", to, "--dry-run"])
    printed = capsys.readouterr().out
    folder = Path(settings["output_dir"]) / f"push-{to}"
    listed = set(re.findall(r"^  (\S+) \([\d,]+ bytes\)$", printed, re.MULTILINE))
    assert listed == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert {"README.md", "config.yaml"} < listed
    forbidden = [str(tmp_path), str(tmp_path.parent.parent), TOKEN, "somebody"]
    if len(user := getpass.getuser()) > 4:  # a shorter one may be a part of any word
        forbidden.append(user)
    for path in folder.iterdir():
        content = path.read_bytes()
        for text in forbidden:
            assert text.encode() not in content, f"{path.name} holds {text}"


def test_the_card_says_what_was_done(settings: dict, capsys, data_folder: Path) -> None:
    make_run(settings, PLANS["masked"])
    run = Path(settings["output_dir"])
    metrics = {"before": {"loss": 3.0, "rouge1": 10.0}, "after": {"loss": 1.5, "rouge1": 40.25}}
    versions = {"python": "3.11.0", "torch": "2.13.0", "peft": "0.21.2"}
    summary = {"metrics": metrics, "versions": versions, "world_size": 4, "samples": {"train": 40, "test": 6}}
    (run / "summary.json").write_text(json.dumps(summary))
    main(["push", str(run), "me/tiny", "--dry-run"])
    capsys.readouterr()
    card = (run / "push-peft" / "README.md").read_text()
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header) == {"library_name": "peft", "tags": ["sparse-llm-ft", "lora"]}
    assert text.startswith("\n# tiny\n")
    for line in (
        "| loss | 3.000 | 1.500 |",
        "| rouge1 | 10.000 | 40.250 |",
        "| layer | q_proj | k_proj | down_proj |",
        "| 0 | 3: 50% × 94% | 3: 50% × 94% | 3: 50% × 96% |",
        "| train | 40 |",
        "| test | 6 |",
        "| torch | 2.13.0 |",
        "deepspeed --num_gpus 4 launch/train.py --config config.yaml",
        'model = PeftModel.from_pretrained(base, "me/tiny")',
        "Task custom, from a local folder.",
    ):
        assert line in text.splitlines(), line
    again = yaml.safe_load((run / "push-peft" / "config.yaml").read_text())
    assert again["model"]["name"] == "tiny-llama" and again["task"]["path"] == data_folder.name
    assert again["method"] == parse_config(settings).model_dump(mode="json")["method"]


def test_the_card_has_the_servers_commands_and_what_a_rank_has_cost(settings: dict, capsys) -> None:
    names = [f"model.layers.{i}.self_attn.{kind}_proj" for i in range(2) for kind in "qv"]
    make_run(settings, AdapterPlan({name: ModuleAdapter(8, 16.0) for name in names}))
    cards = {}
    for options in ((), ("--rank", "32"), ("--for", "llama.cpp")):
        output = Path(settings["output_dir"], "-".join(("push", *options)))
        main(["push", settings["output_dir"], "me/tiny", "--dry-run", "--output", str(output), *options])
        cards[options] = (output / "README.md").read_text()
    capsys.readouterr()
    served = "vllm: vllm serve tiny-llama --enable-lora{} --lora-modules tuned=me/tiny\n"
    assert f"## How to serve it\n\n```\n{served.format('')}" in cards[()] and "relative error" not in cards[()]
    assert served.format(" --max-lora-rank 32") in cards["--rank", "32"]
    assert "This is the adapter at rank 32: relative error of ΔW 0.0000 over all modules" in cards["--rank", "32"]
    gguf = cards["--for", "llama.cpp"]
    assert "library_name: gguf" in gguf and "A LoRA in GGUF for tiny-llama" in gguf and "PeftModel" not in gguf
    assert "```sh\nhf download me/tiny --local-dir tiny\n```" in gguf
    assert "llama.cpp: llama-server --model BASE.gguf --lora tiny/adapter.gguf\n" in gguf


def test_the_card_marks_shared_adapters_and_modules_without(settings: dict) -> None:
    for name, lines in (
        ("grouped", ["| 0 | 4 shared | 4 shared | 4 shared |", "| 1 | 4 | 4 | 4 |"]),
        ("ranked", ["| 0 | 2 | 2 | 2 |", "| 1 | 4 | 4 | – |"]),
    ):
        settings["output_dir"] += name
        make_run(settings, PLANS[name])
        card = model_card(read_run(settings["output_dir"]), "me/tiny", ExportOptions())
        assert set(lines) <= set(card.splitlines())
        assert "Training had not ended when this was uploaded." in card


def test_hub_names_are_themetadata_of(settings: dict) -> None:
    """A base and a task of the hub are linked; a folder is not, since another's repository may be called so."""
    make_run(settings, PLANS["lora"])
    run = read_run(settings["output_dir"])
    assert metadata_of(run, ExportOptions()).to_dict().keys() == {"library_name", "tags"}
    hub_settings = settings | {
        "model": {"name": "meta-llama/Llama-3.1-8B"},
        "task": {"name": "dialogsum"},
    }
    config = parse_config(hub_settings)
    run = replace(run, config=config, context=replace(run.context, task=resolve_task(config.task)))
    metadata = metadata_of(run, ExportOptions("merged")).to_dict()
    assert metadata["base_model"] == "meta-llama/Llama-3.1-8B"
    assert metadata["datasets"] == ["knkarthick/dialogsum"] and metadata["library_name"] == "transformers"


def test_the_card_loads_and_serves_the_revision_of_the_base(settings: dict, tmp_path: Path) -> None:
    """Another one has other weights, and nothing would say so."""
    make_run(settings, PLANS["lora"])
    run = read_run(settings["output_dir"])
    config = run.config.model_copy(
        update={"model": run.config.model.model_copy(update={"name": "org/base", "revision": "v1.2"})}
    )
    run = replace(run, config=config)
    write_export(tmp_path, run, ExportOptions(), "org/base")
    commands = serve_lines(run, tmp_path, ExportOptions(), "org/base", "me/tiny")
    assert commands == [
        "vllm: vllm serve org/base --revision v1.2 --enable-lora --lora-modules tuned=me/tiny",
        "tgi: text-generation-launcher --model-id org/base --revision v1.2 --lora-adapters tuned=me/tiny",
    ]
    card = model_card(run, "me/tiny", ExportOptions(), commands=commands)
    assert 'base = AutoModelForCausalLM.from_pretrained("org/base", revision="v1.2")\n' in card
    assert commands[0] in card
    assert "--model-path org/base --revision v1.2 --enable" in serve_command(
        "sglang", "org/base", "a", 8, revision="v1.2"
    )


def test_local_folders_become_their_last_names(settings: dict) -> None:
    settings["model"]["name"] = "/home/somebody/models/llama"
    settings["model"]["stage_to"] = "/scratch/somebody"
    settings["method"] = {"name": "partial_lora", "cache_dir": "/home/somebody/cache"}
    settings["task"]["prompt"] = "/no_think {text}"
    tree = public_settings(RunConfig.model_validate(settings))
    assert tree["model"]["name"] == "llama" and tree["method"]["cache_dir"] == "cache"
    assert tree["task"]["prompt"] == "/no_think {text}", "a text, not a path"
    assert "somebody" not in json.dumps(tree)


def test_a_path_in_a_prompt_is_not_uploaded(settings: dict, capsys) -> None:
    """What nobody would look for there is refused, not shortened."""
    settings["task"]["prompt"] = f"{settings['task']['path']} {{text}}"
    make_run(settings, PLANS["lora"])
    with pytest.raises(SystemExit) as stop:
        main(["push", settings["output_dir"], "me/tiny", "--dry-run"])
    assert stop.value.code == 2
    assert "config.yaml would contain the local path" in capsys.readouterr().err
    assert not (Path(settings["output_dir"]) / "push-peft").exists()


def test_an_existing_repository_needs_update(here: Hub, settings: dict, capsys) -> None:
    make_run(settings, PLANS["lora"])
    here.exists = True
    with pytest.raises(SystemExit) as stop:
        main(["push", settings["output_dir"], "me/tiny"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: me/tiny: exists; choose another name, or give --update")
    assert not any(request.startswith("POST") for request in here.requests), "nothing was sent"
    main(["push", settings["output_dir"], "me/tiny", "--update"])
    assert capsys.readouterr().out.strip().endswith("/me/tiny")
    assert "README.md" in here.files


def test_an_update_leaves_no_older_model_behind(here: Hub, settings: dict) -> None:
    """transformers takes adapter_config.json before a whole model, and one file of weights before several."""
    make_run(settings, PLANS["lora"])
    here.exists = True
    here.files |= {"config.json": b"a user's", "model.safetensors": b"a user's"}
    main(["push", settings["output_dir"], "me/tiny", "--update"])
    assert here.files["config.json"] == here.files["model.safetensors"] == b"a user's", "nothing was pushed before"
    kept = {"notes.md": b"a user's", "onnx/model.safetensors": b"another's", ".gitattributes": b"*"}
    here.files |= kept | {"model.safetensors": b"old", "model-00001-of-00002.safetensors": b"old", "config.json": b"{}"}
    main(["push", settings["output_dir"], "me/tiny", "--update"])
    ours = {"README.md", "config.yaml", "adapter_config.json", "adapter_model.safetensors"}
    assert here.files.keys() == ours | kept.keys()
    main(["push", settings["output_dir"], "me/tiny", "--to", "merged", "--update"])
    assert here.files.keys() >= {"config.json", "model.safetensors"} | kept.keys()
    assert not any(name.startswith("adapter") for name in here.files)
    assert {name: here.files[name] for name in kept} == kept


@pytest.mark.parametrize("is_private", [True, False])
def test_a_private_upload_does_not_go_into_a_public_repository(
    is_private: bool, here: Hub, settings: dict, capsys
) -> None:
    make_run(settings, PLANS["lora"])
    here.exists, here.private = True, is_private
    arguments = ["push", settings["output_dir"], "me/tiny", "--private", "--update"]
    if is_private:
        main(arguments)
        assert "README.md" in here.files
        return
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: me/tiny: is public; make it private on the hub first, or leave out --private\n"
    )
    assert not any(request.startswith("POST") for request in here.requests), "nothing was sent"


@pytest.mark.parametrize(
    ("path", "status", "said", "message"),
    [
        ("/api/repos/create", 401, "Invalid credentials", "the hub does not accept the access token; log in"),
        ("/api/repos/create", 403, "no rights", r"the access token has no write access there \(.*no rights.*\)"),
        ("/api/repos/create", 409, "You already created it", "exists; choose another name"),
        ("/api/repos/create", 500, "broken", r"the hub answered 500 \(.*broken.*\)"),
        (
            "/api/models/me/tiny/preupload",
            403,
            "read only",
            r"the access token has no write access .*exists now; retry with --update",
        ),
        ("/api/models/me/tiny/commit", 400, "bad file", r"the hub answered 400 .*bad file"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    path: str, status: int, said: str, message: str, here: Hub, tmp_path: Path
) -> None:
    here.refusals[path] = (status, said)
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "config.yaml").write_text("a: 1\n")
    with pytest.raises(UserError, match=f"^me/tiny: {message}") as caught:
        upload(folder, "me/tiny", private=False, update=False)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    assert not here.files


def test_no_token_is_said_before_anything_is_asked(here: Hub, monkeypatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="me/tiny: no access token for the hub; log in with `hf auth login`"):
        check_repository("me/tiny", private=False, update=False)
    assert not here.requests


def test_no_network_is_one_line(here: Hub, monkeypatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(UserError, match=r"^me/tiny: the hub cannot be used .*Connect"):
            check_repository("me/tiny", private=False, update=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^me/tiny: the hub cannot be used .*offline mode"):
        check_repository("me/tiny", private=False, update=False)


@pytest.mark.parametrize(
    "name", ["tiny", "me/", "/tiny", "me/ti ny", "me/tiny/more", "../tiny", "me/--", "me/" + "x" * 99]
)
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="not a repository name; expected NAMESPACE/NAME"):
        check_name(name)


def test_output_is_for_dry_runs(settings: dict, capsys) -> None:
    make_run(settings, PLANS["lora"])
    with pytest.raises(SystemExit) as stop:
        main(["push", settings["output_dir"], "me/tiny", "--output", "somewhere"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: --output somewhere: expected --dry-run beside it")
