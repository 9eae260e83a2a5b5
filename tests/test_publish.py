"""An adapter's way to people: the page's commands and snippets as printed, the model card, and the upload to a hub on
loopback.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import copy_project, sh
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import ModelCardData
from PIL import Image
from safetensors.torch import load_file

from app import audit, model
from app.adapter import formats
from app.config import RunConfig
from app.errors import AdapterError
from app.families import sd
from app.hub.history import Base, Given, Provenance
from bouquet import ROOT, cli
from bouquet.adapter import card, membership, parity
from bouquet.adapter import publish as publishing
from bouquet.adapter.membership import Attack, Membership
from bouquet.hub import admission
from tests.kit import tiny
from tests.kit.hugging_face import TOKEN, Hub

# huggingface_hub's PUT with httpx 0.28
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<:DeprecationWarning")
PAGE = (ROOT / "docs" / "models.md").read_text()
MINI = ROOT / "models" / "mini"
CONFIG = RunConfig.read(
    {
        "lora-rank": 2,
        "rounds": 3,
        "sample-steps": 2,
        "sample-prompts": "a red poppy, meadow background|a white lily, night background",
    }
)
SITES = {"rose garden": {"images": 40}, "lily clinic": {"images": 24}}


def figures(site: str) -> Membership:
    """What a site found of the tiny run's adapter."""
    attacks = {"loss": Attack(0.52, 0.45, 0.59), "pia": Attack(0.5, 0.4, 0.6)}
    return Membership(site, "12", model.adapter_hash(tiny.adapter(3)), 200, 60, attacks)


def run(adapters: Path, config: RunConfig, base: Path, adapter: model.Adapter) -> Path:
    """A finished run's folder, with the provenance that the hub writes, and `latest`."""
    told = Provenance(
        run="12",
        made="2026-11-24T02:00:00Z",
        adapter_sha256=model.adapter_hash(adapter),
        base=Base(config.base_model, model.fingerprint(base)["base"]),
        rounds=config.rounds,
        sites={name: Given(**given) for name, given in SITES.items()},
        images=64,
        config=asdict(config),
        versions=formats.versions(),
    )
    formats.write_final(adapters / "12", adapter, config, sd.FAMILY, told)
    (adapters / "latest").symlink_to("12")
    return adapters / "12"


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the project with a finished run of the demo's base model, as after scripts/demo."""
    folder = copy_project(tmp_path_factory.mktemp("models") / "bouquet")
    draw = torch.Generator().manual_seed(1)
    adapter = {
        key: torch.randn(value.shape, generator=draw) * 0.2 for key, value in model.new_adapter(MINI, CONFIG).items()
    }
    (folder / ".bouquet" / "adapters").mkdir(parents=True)
    run(folder / ".bouquet" / "adapters", CONFIG, MINI, adapter)
    sh("scripts/bouquet data partition --dataset mini --sites 2 --out .bouquet/data --images-per-site 24", folder)
    for tool in ("ComfyUI/models/loras", "stable-diffusion-webui/models/Lora"):
        (folder.parent / tool).mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    """A finished run of the tiny base model."""
    return run(tmp_path_factory.mktemp("adapters"), tiny.CONFIG, tiny.base(), tiny.adapter(3))


@pytest.fixture(scope="module")
def drawn() -> dict[frozenset[tuple[str, str]], list[parity.Drawn]]:
    """What was found of which files: the same bytes draw the same, so that a module draws them once."""
    return {}


@pytest.fixture
def publish(tiny_run, drawn, tmp_path, monkeypatch, capsys):
    """`bouquet adapter publish garden/flowers OPTION...` on a copy of the tiny run: (exit code, what it printed,
    the final folder).
    """
    check = parity.check

    def once(final: Path, base: Path, config: RunConfig) -> list[parity.Drawn]:
        files = frozenset(
            (str(file.relative_to(final)), hashlib.sha256(file.read_bytes()).hexdigest()) for file in final.rglob("*.*")
        )
        if files not in drawn:
            drawn[files] = check(final, base, config)
        return drawn[files]

    monkeypatch.setattr(parity, "check", once)
    monkeypatch.setattr(admission, "ADMITTED", tmp_path / "admitted")
    final = shutil.copytree(tiny_run / "final", tmp_path / "run" / "final")
    files = [tmp_path / f"{number}.membership.json" for number in range(len(SITES))]
    for file, site in zip(files, SITES, strict=True):
        membership.write(file, figures(site))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    def call(*options: str, repo: str = "garden/flowers", measured: bool = True):
        given = ["publish", repo, "--adapter", str(final), "--models", str(tiny.models()), "--licence", "mit", *options]
        given += [f"--membership={file}" for file in files if measured]
        code = cli.main(["adapter", *given])
        shown = capsys.readouterr()
        return code, shown.out + shown.err, final

    call.final = final  # type: ignore[attr-defined]
    return call


# --- its two halves alone
# --------------------------------------------------------------------------------------------------------------


def test_parity_alone_has_a_line_a_path_and_writes_nothing(publish, capsys):
    before = sorted(publish.final.rglob("*"))
    asked = ["adapter", "parity", "--adapter", str(publish.final), "--models", str(tiny.models())]
    assert cli.main(asked) == 0
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    paths = [("same", path, precision) for precision in ("fp32", "fp16") for path in ("PEFT", "diffusers", "kohya")]
    assert [tuple(row) for row in rows] == [*paths, ("same", "merged", "fp32")]
    assert sorted(publish.final.rglob("*")) == before
    (publish.final / formats.KOHYA).unlink()
    assert cli.main(asked) == 1 and "EXPORT-02" in capsys.readouterr().err


def test_the_card_alone_goes_to_standard_output_or_a_file_and_names_no_site(publish, capsys, tmp_path):
    asked = ["adapter", "card", "garden/flowers", "--adapter", str(publish.final), "--licence", "mit"]
    assert cli.main(asked) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("---\n") and "# flowers" in shown and "license: mit" in shown
    assert "rose garden" not in shown and not (publish.final / "README.md").exists()
    assert cli.main([*asked, "--out", str(tmp_path / "card.md")]) == 0
    assert (tmp_path / "card.md").read_text() == shown
    assert cli.main(asked[:-2]) == 1 and "EXPORT-06" in capsys.readouterr().err


# --- the page
# --------------------------------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    return [line.partition("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]


@pytest.mark.slow
def test_the_pages_commands_run_as_printed(copy):
    typed = [command for command in commands() if "--upload" not in command]
    for command in typed:
        shown = sh(command.replace("OWNER/", "garden/"), copy).stdout
        assert "Traceback" not in shown
    assert len(typed) == 11
    names = ["sample.png", "sweep.png", "lily.png", "merged/model_index.json", "site-1.memory.json"]
    names += ["site-1.membership.json"]
    names += [f".bouquet/adapters/latest/{name}" for name in ("final/README.md", "measures.json", "memory.json")]
    assert [name for name in names if not (copy / name).is_file()] == []
    for tool in ("ComfyUI/models/loras", "stable-diffusion-webui/models/Lora"):
        assert (copy.parent / tool / "flowers.safetensors").read_bytes() == (
            copy / ".bouquet/adapters/latest/final/kohya.safetensors"
        ).read_bytes()


@pytest.mark.slow
def test_the_pages_snippets_run_as_printed_one_after_the_other_and_draw_what_they_say(copy, monkeypatch):
    from diffusers import StableDiffusionPipeline as Pipeline

    def call(self, *args, _full=Pipeline.__call__, **kwargs):
        return _full(self, *args, num_inference_steps=2, generator=torch.Generator().manual_seed(3), **kwargs)

    if not (copy / "merged").is_dir():
        sh("scripts/bouquet adapter sample --merge merged", copy)
    monkeypatch.setattr(Pipeline, "__call__", call)
    monkeypatch.chdir(copy)
    session: dict = {}
    for block in blocks("python"):
        exec(compile(block, "docs/models.md", "exec"), session)
    full, weaker, peft, merged = (
        np.asarray(Image.open(copy / f"poppy{name}.png").convert("RGB")).astype(int)
        for name in ("", "-weaker", "-peft", "-merged")
    )
    assert np.abs(full - peft).max() <= 1 and np.abs(full - merged).max() <= 2  # of 255
    assert np.abs(full - weaker).mean() > 1


def test_half_precision_has_the_same_tensors_in_half_the_bytes(tiny_run):
    sizes = [
        sum(value.nbytes for value in load_file(tiny_run / "final" / folder / formats.DIFFUSERS).values())
        for folder in (".", "fp16")
    ]
    assert sizes[0] == 2 * sizes[1] == 4 * sum(value.numel() for value in tiny.adapter(3).values())


def test_every_file_of_the_final_folder_stands_on_the_page(tiny_run):
    table = PAGE.partition("| file | for |")[2].partition("\n\n")[0]
    named = {name.rstrip("/") for name in re.findall(r"`([^`]+)`", table)}
    assert named == {path.name for path in (tiny_run / "final").iterdir()}


# --- the card
# ----------------------------------------------------------------------------------------------------------------


def card_of(folder: Path) -> tuple[dict, str]:
    """(front matter, text), read by huggingface_hub, which refuses front matter that it cannot use."""
    read = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    assert isinstance(read.data, ModelCardData)
    return read.data.to_dict(), read.text


def size_of(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def test_the_cards_front_matter_is_what_the_hub_reads(publish):
    code, shown, final = publish("--base-id", "garden/base")
    assert code == 0, shown
    data, _ = card_of(final)
    first, second = tiny.CONFIG.prompts
    assert data == {
        "base_model": "garden/base",
        "base_model_relation": "adapter",
        "license": "mit",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": card.tags(sd.FAMILY),
        "instance_prompt": first,
        "widget": [
            {"text": first, "output": {"url": "images/1.png"}},
            {"text": second, "output": {"url": "images/2.png"}},
        ],
    }
    # plain YAML 1.1, nothing of Python's
    assert data == yaml.safe_load((final / "README.md").read_text().split("---\n")[1])
    assert all(size_of(final / entry["output"]["url"]) == (16, 16) for entry in data["widget"])


def test_stable_diffusions_place_on_the_hub_and_licence_are_known():
    config = RunConfig.read({"base-model": "stable-diffusion-v1-5"})
    assert card.licence(config, None) == "creativeml-openrail-m" and card.licence(config, "mit") == "mit"
    assert sd.FAMILY.repositories[config.base_model].name == "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.mark.slow
def test_the_cards_snippet_runs_as_printed(publish, monkeypatch, tmp_path):
    _, _, final = publish("--base-id", "garden/base")
    [snippet] = re.findall(r"^```python\n(.*?)^```", card_of(final)[1], re.DOTALL | re.MULTILINE)
    assert '"garden/base"' in snippet and '"garden/flowers"' in snippet
    monkeypatch.chdir(tmp_path)
    exec(
        compile(
            snippet.replace("garden/base", str(tiny.base())).replace("garden/flowers", str(final)), "README.md", "exec"
        ),
        {},
    )
    assert size_of(tmp_path / "picture.png") == (16, 16)


def test_the_card_tells_provenance_and_limits_and_names_no_site(publish):
    _, _, final = publish()
    data, text = card_of(final)
    told = json.loads((final / "provenance.json").read_text())
    for known in (
        "| sites | 2 |",
        "| training images | 64 |",
        "rank 2, alpha 2",
        told["adapter_sha256"],
        told["base"]["fingerprint"],
        "## Limits",
    ):
        assert known in text
    assert not any(site in text for site in SITES)
    assert "base_model" not in data  # nobody said where the hub has `tiny`


def test_the_cards_batch_is_the_images_of_a_step_over_all_its_passes():
    config = tiny.config(batch_size=2, gradient_accumulation=3)  # 2 × 3
    told = card.table(config, Provenance(rounds=5), sd.FAMILY)
    assert "| rounds × local steps × images a step | 5 × 3 × 6 |" in told


# --- what goes out, and what does not
# --------------------------------------------------------------------------------------------


def test_without_upload_nothing_is_sent_and_everything_before_it_is_done(publish, monkeypatch):
    with Hub() as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        code, shown, final = publish()
    assert code == 0 and hub.asked == []
    assert shown.count("same     ") == 7 and "nothing was sent" in shown and "--upload" in shown
    assert "the card names no base model of the hub" in shown
    assert sorted(path.name for path in (final / "images").iterdir()) == ["1.png", "2.png", "before-after.png"]


@pytest.fixture
def hub(monkeypatch):
    """The hub on loopback, as HF_ENDPOINT names one; without Xet, whose storage it does not speak."""
    with Hub() as here:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", here.url)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.HF_HUB_DISABLE_XET", True)
        yield here


def test_upload_sends_exactly_the_listed_files_in_one_commit(publish, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code, shown, final = publish("--upload", "--base-id", "garden/base")
    assert code == 0, shown
    repo = hub.repos["garden/flowers"]
    listed = re.findall(r"^file +[\d,]+ +(\S+)$", shown, re.MULTILINE)
    assert (
        sorted(repo["files"]) == sorted(listed)
        and repo["private"]
        and len([r for r in hub.asked if "/commit/" in r]) == 1
    )
    assert f"{hub.url}/garden/flowers/commit/" in shown and TOKEN not in shown
    for path, content in repo["files"].items():
        assert path == "provenance.json" or content == (final / path).read_bytes()
    assert set(listed) == {
        "README.md",
        "provenance.json",
        "images/1.png",
        "images/2.png",
        "images/before-after.png",
    } | {f"{folder}{name}" for folder in ("", "fp16/") for name in formats.files(sd.FAMILY)}


def test_a_run_that_named_the_sites_that_it_asked_does_not_tell_them_in_public():
    sites = {"garden": Given(40, 30), "clinic": Given(24)}
    provenance = Provenance(config={"rounds": 2, "sites": "garden,clinic"}, sites=sites)
    assert publishing.provenance_for(provenance, named=False) == Provenance(
        config={"rounds": 2}, sites={"site 1": Given(40, 30), "site 2": Given(24)}
    )
    assert publishing.provenance_for(provenance, named=True) == provenance


@pytest.mark.slow
def test_what_was_published_is_a_line_of_the_hubs_log_and_a_look_at_it_is_none(publish, hub, monkeypatch):
    admission.ADMITTED.mkdir()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    publish()
    assert not (admission.ADMITTED / "audit.jsonl").exists()
    _, _, final = publish("--upload")
    (_, entry) = audit.check((admission.ADMITTED / "audit.jsonl").read_bytes()).entries
    told = json.loads((final / "provenance.json").read_text())
    assert (entry["did"], entry["repository"], entry["public"]) == ("published", "garden/flowers", False)
    assert entry["adapter"] == told["adapter_sha256"]
    assert entry["membership"].startswith("lily clinic: loss 0.52 [0.45, 0.59]; pia")


def test_without_the_sites_figures_a_look_is_free_and_sending_is_refused_before_anything_is_drawn(
    publish, hub, monkeypatch
):
    code, shown, final = publish(measured=False)
    assert code == 0 and "no membership figures of lily clinic, rose garden" in shown
    assert "**Not measured.**" in card_of(final)[1]
    monkeypatch.setattr(parity, "check", lambda *_: pytest.fail("something was drawn"))
    code, shown, _ = publish("--upload", measured=False)
    assert code == 1 and "EXPORT-09" in shown and "--without-membership" in shown and hub.asked == []


@pytest.mark.slow
def test_sent_with_figures_the_card_has_them_and_with_a_threshold_below_them_nothing_is_sent(publish, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    final = publish.final
    told = json.loads((final / "provenance.json").read_text())
    (final / "provenance.json").write_text(json.dumps(told | {"config": told["config"] | {"release_auc": 0.55}}))
    code, shown, _ = publish("--upload")
    assert code == 1 and "EXPORT-10" in shown and "rose garden loss 0.52 [0.45, 0.59]" in shown and hub.asked == []
    (final / "provenance.json").write_text(json.dumps(told | {"config": told["config"] | {"release_auc": 0.6}}))
    assert publish("--upload")[0] == 0
    sent = hub.repos["garden/flowers"]["files"]["README.md"].decode()
    assert "| site 2 | 200 / 60 | 0.52 [0.45, 0.59] | 0.50 [0.40, 0.60] |" in sent and "above 0.6." in sent


@pytest.mark.slow
def test_sites_go_out_unnamed_unless_that_is_asked_for(publish, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    publish("--upload")
    sent = json.loads(hub.repos["garden/flowers"]["files"]["provenance.json"])
    assert sent["sites"] == {"site 1": {"images": 40}, "site 2": {"images": 24}} and sent["images"] == 64
    assert not any(
        site.encode() in content for site in SITES for content in hub.repos["garden/flowers"]["files"].values()
    )
    publish("--upload", "--name-sites", "--public", repo="garden/open")
    assert json.loads(hub.repos["garden/open"]["files"]["provenance.json"])["sites"] == SITES
    assert not hub.repos["garden/open"]["private"]


def test_the_token_may_be_a_file(publish, hub, monkeypatch, tmp_path):
    (tmp_path / "token").write_text(TOKEN + "\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    code, shown, _ = publish("--upload")
    assert code == 0 and "garden/flowers" in hub.repos and TOKEN not in shown


def test_there_is_no_option_for_a_token(capsys):
    assert cli.main(["adapter", "publish", "garden/flowers", "--token", TOKEN]) == 2
    said = capsys.readouterr().err
    assert "No such option" in said and "--token" in said


@pytest.mark.parametrize(
    ("token", "repo", "full", "words"),
    [
        ("", "garden/flowers", False, "this machine has no token"),
        ("hf_wrong", "garden/flowers", False, "401: Invalid username or password."),
        (TOKEN, "somebody-else/flowers", False, "403: You don't have the rights"),
        (TOKEN, "garden/flowers", True, "400: no room"),
    ],
)
def test_what_the_hub_says_when_it_refuses_stands_in_the_error(
    publish, hub, monkeypatch, tmp_path, token, repo, full, words
):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("HF_TOKEN", token)
    hub.full = full
    code, shown, _ = publish("--upload", repo=repo)
    assert code == 1 and "EXPORT-07" in shown and words in shown
    assert not token or token not in shown
    assert not any(entry["files"] for entry in hub.repos.values())


# --- what is refused before anything is drawn
# ----------------------------------------------------------------------------------


def test_a_licence_that_nobody_named_is_asked_for():
    with pytest.raises(AdapterError, match="EXPORT-06"):
        card.licence(tiny.CONFIG, None)


def test_a_folder_without_the_final_files_is_named(publish):
    final = publish.final
    (final / "fp16" / "kohya.safetensors").unlink()
    code, shown, _ = publish()
    assert code == 1 and "EXPORT-02" in shown and "fp16/kohya.safetensors" in shown


def test_files_of_another_run_than_the_provenance_tells_are_refused(publish):
    final = publish.final
    formats.write_formats(final, tiny.adapter(4), tiny.CONFIG, sd.FAMILY)
    code, shown, _ = publish()
    assert code == 1 and "EXPORT-01" in shown and "provenance.json tells of" in shown


def test_another_base_model_than_the_runs_is_refused(publish):
    final = publish.final
    told = json.loads((final / "provenance.json").read_text())
    (final / "provenance.json").write_text(json.dumps(told | {"base": {"name": "tiny", "fingerprint": "0" * 64}}))
    code, shown, _ = publish()
    assert code == 1 and "MODEL-04" in shown


@pytest.mark.parametrize("repo", ["flowers", "a/b/c", "garden/fl owers"])
def test_a_name_that_hugging_face_cannot_have_is_refused_at_once(repo, capsys):
    assert cli.main(["adapter", "publish", repo]) == 2
    assert repo in capsys.readouterr().err
