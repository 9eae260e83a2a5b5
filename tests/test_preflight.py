"""The preflight's checks against what they check: real TLS servers, a real SuperLink, a real model and real photos.

Only the GPU is a stand-in (tests/kit/nvml_stub.c).
"""

from __future__ import annotations

import datetime
import http.server
import ipaddress
import json
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import sh
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from app import model
from app.errors import BouquetError
from app.site import optimisers, privacy, train
from app.site.photos import data
from bouquet import cli
from bouquet.hub.deployment import Processes, free_port
from bouquet.hub.runs import connect, flwr, nodes_online
from bouquet.site import preflight, reach, trial
from bouquet.site.preflight import Preflight, Settings
from tests.kit import tiny
from tests.kit.nvml import A10, T4, StandIn, gpu

DAY = datetime.timedelta(days=1)
RUN = 'base-model="tiny" resolution=16 batch-size=4 lora-rank=2 precision="fp32"'


# --- TLS
# ---------------------------------------------------------------------------------------------------------------


class Authority:
    """A CA that writes certificates for any names and days, good and bad."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.key = folder, ec.generate_private_key(ec.SECP256R1())
        self.subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.ca = folder / f"{name}.crt"
        made = self._make(self.subject, self.key.public_key(), -DAY, 3650 * DAY).add_extension(
            x509.BasicConstraints(True, None), True
        )
        self.ca.write_bytes(made.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def _make(self, subject, public_key, start, end) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return x509.CertificateBuilder(
            self.subject, subject, public_key, x509.random_serial_number(), now + start, now + end
        )

    def server(self, names=("localhost", "127.0.0.1"), start=-DAY, end=90 * DAY) -> ssl.SSLContext:
        """TLS of a server whose certificate is for `names`, valid from `start` to `end` from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives = [x509.IPAddress(ipaddress.ip_address(n)) if n[0].isdigit() else x509.DNSName(n) for n in names]
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "hub")])
        made = self._make(subject, key.public_key(), start, end).add_extension(
            x509.SubjectAlternativeName(alternatives), False
        )
        both = self.folder / f"server-{made._serial_number}.pem"
        both.write_bytes(
            made.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
            + key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(both)
        return context


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"), "ours")


class Hub:
    """A web server that answers 404 to everything; its clock is `ahead` seconds off."""

    def __init__(self, tls: ssl.SSLContext | None, ahead: float = 0) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def date_time_string(self, timestamp=None) -> str:
                return super().date_time_string(time.time() + ahead)

            def do_GET(self) -> None:
                self.send_error(404)

            def log_message(self, *args: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, request, client_address) -> None:
                pass  # a client that hung up: what the tests provoke

        self.server = Server(("127.0.0.1", 0), Handler)
        if tls:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.address = f"localhost:{self.server.server_port}"

    def __enter__(self) -> str:
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()
        return self.address

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def refused(code: str, check, *arguments) -> str:
    """What a check found when it failed with `code`."""
    with pytest.raises(BouquetError, match=f"^{code}  ") as caught:
        check(*arguments)
    return caught.value.found


def test_a_good_certificate_says_how_long_it_holds(authority: Authority) -> None:
    with Hub(authority.server(end=90 * DAY)) as hub:
        assert reach.certificate(hub, authority.ca) == pytest.approx(90, abs=0.01)


def test_a_hub_of_another_ca_is_told_from_other_mistakes(authority: Authority, tmp_path: Path) -> None:
    with Hub(Authority(tmp_path, "theirs").server()) as hub:
        assert "unable to get local issuer certificate" in refused("CHECK-02", reach.certificate, hub, authority.ca)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_certificate_for_another_name_is_told_from_other_mistakes(authority: Authority, host: str) -> None:
    with Hub(authority.server(names=("hub.example.org", "192.0.2.7"))) as hub:
        assert "mismatch" in refused("CHECK-03", reach.certificate, hub.replace("localhost", host), authority.ca)


@pytest.mark.parametrize(("start", "end", "found"), [(-2 * DAY, -DAY, "expired"), (DAY, 2 * DAY, "not yet valid")])
def test_a_certificate_that_is_not_valid_now_is_told_from_other_mistakes(
    authority: Authority, start, end, found: str
) -> None:
    with Hub(authority.server(start=start, end=end)) as hub:
        assert found in refused("CHECK-04", reach.certificate, hub, authority.ca)


def test_a_closed_port_a_port_without_tls_and_an_unknown_name_say_what_they_are(authority: Authority) -> None:
    assert "refused" in refused("CHECK-01", reach.certificate, f"127.0.0.1:{free_port()}", authority.ca)
    with Hub(None) as plain:
        assert "not with TLS" in refused("CHECK-01", reach.certificate, plain, authority.ca)
    assert "no address is known" in refused("CHECK-01", reach.certificate, "hub.invalid:8443", authority.ca)


@pytest.mark.parametrize("hub", ["", "hub.example.org", "https://hub.example.org:8443", "hub:eight"])
def test_a_hub_without_name_and_port_is_refused(hub: str) -> None:
    assert refused("CHECK-09", reach.address, hub) == f"HUB={hub!r}"


def test_a_ca_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("nothing")
    assert str(tmp_path / "ca.crt") in refused("CHECK-09", reach.trust, tmp_path / "ca.crt")
    assert "No such file" in refused("CHECK-09", reach.trust, tmp_path / "absent.crt")


@pytest.mark.parametrize("ahead", [0, 100, 290, -3])
def test_a_clock_within_flowers_bounds_passes(authority: Authority, ahead: int) -> None:
    with Hub(authority.server(), ahead) as hub:
        assert reach.clock(hub, authority.ca) == pytest.approx(-ahead, abs=1.5)


@pytest.mark.parametrize(("ahead", "said"), [(-20, "ahead of"), (400, "behind")])
def test_a_clock_that_flower_would_refuse_fails(authority: Authority, ahead: int, said: str) -> None:
    with Hub(authority.server(), ahead) as hub:
        found = refused("CHECK-05", reach.clock, hub, authority.ca)
    assert f" s {said} the hub's" in found and int(found.split()[0]) == pytest.approx(abs(ahead), abs=1)


# --- the key, at a real SuperLink
# ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def federation(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """A SuperLink that has admitted site-1."""
    home = tmp_path_factory.mktemp("hub")
    sh("scripts/certs site-1", project)
    running = Processes(home, project / "certs", free_port(), {"site-1": tiny.site(home / "photos")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_HOME", str(home / "operator"))
        connect(running.address, project / "certs/ca.crt")
        try:
            running.start_hub()
            running.register()
            yield running
        finally:
            running.stop()


def nodes() -> list[dict]:
    return flwr("supernode", "ls", "remote-deployment")["nodes"]


def test_an_admitted_key_passes_and_the_hub_does_not_take_the_site_for_online(federation: Processes) -> None:
    reach.admitted(federation.address, federation.certs / "ca.crt", federation.certs / "site-1.key")
    assert {node["status"] for node in nodes()} == {"registered"}


def test_a_running_supernode_with_the_same_key_does_not_notice(federation: Processes) -> None:
    federation.start_site("site-1")
    try:
        federation.wait_until_online(1)
        log = federation.logs / "superlink.log"
        activations = log.read_text().count("Activated node_id")
        for _ in range(3):
            reach.admitted(federation.address, federation.certs / "ca.crt", federation.certs / "site-1.key")
        time.sleep(4)  # it asks the hub every 3 s
        assert nodes_online() == 1 and federation.running["site-1"].poll() is None
        assert log.read_text().count("Activated node_id") == activations == 1
    finally:
        federation.stop_site("site-1")


def test_a_key_that_the_hub_does_not_know_fails_with_its_fingerprint(federation: Processes, tmp_path: Path) -> None:
    key = tmp_path / "site.key"
    sh(f"ssh-keygen -q -t ecdsa -b 384 -N '' -f {key}", tmp_path)
    shown = subprocess.run(["ssh-keygen", "-lf", key], capture_output=True, text=True, check=True).stdout.split()[1]
    assert shown in refused("CHECK-06", reach.admitted, federation.address, federation.certs / "ca.crt", key)


def test_a_key_of_a_kind_that_flower_does_not_take_is_refused_before_the_hub_is_asked(tmp_path: Path) -> None:
    sh(
        "ssh-keygen -q -t ed25519 -N '' -f ed; ssh-keygen -q -t ecdsa -N secret -f locked; openssl ecparam -name"
        " prime256v1 -genkey -out pem",
        tmp_path,
    )
    arguments = ("localhost:1", tmp_path / "ca.crt")
    assert "of another kind" in refused("CHECK-07", reach.admitted, *arguments, tmp_path / "ed")
    assert "without a password" in refused("CHECK-07", reach.admitted, *arguments, tmp_path / "locked")
    assert "OpenSSH" in refused("CHECK-07", reach.admitted, *arguments, tmp_path / "pem")
    assert "No such file" in refused("CHECK-07", reach.admitted, *arguments, tmp_path / "absent")


def test_a_signature_that_the_hub_takes_for_stale_is_told_from_an_unknown_key(
    federation: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=400)
    monkeypatch.setattr("flwr.supernode.node_auth_http_interceptor.now", lambda: late)
    found = refused(
        "CHECK-06", reach.admitted, federation.address, federation.certs / "ca.crt", federation.certs / "site-1.key"
    )
    assert found.endswith("refuses the signature")


# --- all of it
# -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a site that lacks a hub."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "site.key").touch(0o600)
    env = {
        "SITE_NAME": "site-1", "BOUQUET_DATA": str(tiny.site(tmp_path / "photos")),
        "BOUQUET_MODELS": str(tiny.models()), "BOUQUET_CACHE": str(tmp_path / "cache"),
        "BASE_FINGERPRINT": model.fingerprint(tiny.base())["base"], "CA": "/nowhere/ca.crt", "HUB": "localhost:1",
        "SITE_KEY": str(tmp_path / "site.key"), "SITE_GPU": "none", "RUN_CONFIG": RUN,
    }  # fmt: skip
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return env


def lines(site: dict[str, str], *names: str, **changes: str) -> dict[str, preflight.Line]:
    """The lines of the named checks, and of what they need."""
    checks, wanted = Preflight(Settings.read(site | changes)), set(names)
    for name, needs in reversed(Preflight.NEEDS.items()):
        wanted |= set(needs) if name in wanted else set()
    checks.NEEDS = {name: needs for name, needs in Preflight.NEEDS.items() if name in wanted}
    return {line.name: line for line in checks.run(fast=False)}


def test_a_site_that_is_ready_passes_every_check_and_sees_a_steps_seconds(
    federation: Processes,
    site: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
) -> None:
    for name, value in {
        "HUB": federation.address,
        "CA": federation.certs / "ca.crt",
        "SITE_KEY": federation.certs / "site-1.key",
    }.items():
        monkeypatch.setenv(name, str(value))
    assert cli.main(["site", "check"]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("bouquet: encoded")]
    assert [line.split()[:2] for line in shown[:-1]] == [
        ["pass", "name"], ["pass", "gpu"], ["skip", "driver"], ["skip", "others"], ["pass", "disk"], ["pass", "hub"],
        ["pass", "clock"], ["pass", "key"], ["pass", "model"], ["pass", "data"], ["pass", "memory"], ["pass", "decode"],
        ["pass", "step"],
    ]  # fmt: skip
    assert "s a step on the CPU, 4 images each; peak memory" in shown[-2]
    assert shown[-1] == "ready: 11 pass, 2 skip"
    assert not [left for left in (tmp_path / "cache").iterdir() if not left.name.startswith(("sum-", "seen."))]


def test_the_fast_part_leaves_out_the_decoding_and_the_step_and_prints_json_when_asked(
    site: dict[str, str], capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["site", "check", "--fast", "--json"]) == 1  # there is no hub
    report = json.loads(capsys.readouterr().out)
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert report["ok"] is False and "decode" not in states and "step" not in states
    assert (states["hub"], states["clock"], states["key"], states["memory"]) == ("fail", "skip", "skip", "pass")


def test_what_a_failed_check_makes_pointless_is_skipped_and_said_so(site: dict[str, str]) -> None:
    shown = lines(site, "step", BOUQUET_DATA="/nowhere")
    assert (shown["data"].state, shown["decode"].state, shown["step"].state) == ("fail", "skip", "skip")
    assert str(shown["data"]).splitlines() == [
        "fail  data      SITE-03  The data folder cannot be opened.",
        "                /nowhere does not exist",
        "      fix       set this site's data folder in .env, then: docker compose up -d",
    ]
    assert shown["step"].text == "not checked: memory, decode must pass first"


def test_an_unknown_run_config_key_ends_the_preflight_with_its_name(
    site: dict[str, str], capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["site", "check", "--run-config", "batch=4"]) == 1
    assert "CONFIG-01" in capsys.readouterr().out


def test_another_base_model_than_the_hubs_fails_and_an_unknown_one_warns(site: dict[str, str]) -> None:
    assert lines(site, "model", BASE_FINGERPRINT="f" * 64)["model"].text.startswith("MODEL-04")
    assert lines(site, "model", BASE_FINGERPRINT="")["model"].state == "warn"
    assert lines(site, "model", RUN_CONFIG='base-model="other"')["model"].text.startswith("MODEL-01")


def test_damaged_hostile_and_foreign_files_are_set_aside_by_name(site: dict[str, str], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "cut.png").write_bytes((photos / "0000.png").read_bytes()[:-200] + b"x" * 200)
    Image.new("1", (20_000, 20_000)).save(photos / "bomb.png")
    Image.new("RGB", (8, 8)).save(photos / "old.gif")
    (tmp_path / "private.png").write_bytes((photos / "0001.png").read_bytes())
    (photos / "link.png").symlink_to(tmp_path / "private.png")
    (photos / "caption.txt").write_text("a flower")
    privacy.declare_public(photos, data.scan(photos).photos)
    line = lines(site, "decode")["decode"]
    assert line.state == "warn"
    assert "8 usable" in line.text
    for said in (
        "bomb.png: more than 50 million",
        "cut.png: the header or the pixels",
        "link.png: a link",
        "old.gif: not PNG",
    ):
        assert said in line.text


def test_a_site_learns_before_it_joins_that_private_photos_need_more_than_a_few(
    site: dict[str, str], tmp_path: Path
) -> None:
    few, enough = (str(tiny.site(tmp_path / f"private-{count}", count, public=False)) for count in (12, 16))
    line = lines(site, "data", BOUQUET_DATA=few)["data"]
    assert (
        line.state == "fail"
        and line.text.startswith("SITE-02")
        and "12 usable" in line.text
        and "16 are needed" in line.text
    )
    assert lines(site, "decode", BOUQUET_DATA=enough)["decode"].text == "all 16 pictures can be read; they are private"
    assert lines(site, "decode", BOUQUET_DATA=few, SITE_LIMITS="min-photos=4 min-held-out=4")["decode"].state == "pass"


def test_a_computers_own_files_are_counted_and_no_cause_for_a_warning(site: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "photos" / ".DS_Store").touch()
    (tmp_path / "photos" / "@eaDir").mkdir()
    line = lines(site, "decode")["decode"]
    assert (line.state, line.text) == (
        "pass",
        "all 8 pictures can be read; they are public, and 2 files are a computer's own",
    )


def test_every_other_file_that_is_not_used_is_a_warning_and_not_counted_as_a_picture(
    site: dict[str, str], tmp_path: Path
) -> None:
    for name in ("photos.zip", "0000.txt", "gone.txt"):
        (tmp_path / "photos" / name).write_text("a flower")
    found = lines(site, "data", "decode")
    assert found["data"].text.startswith("8 pictures in") and found["decode"].state == "warn"
    assert (
        "set aside: 1 not-a-picture, 2 unused-caption" in found["decode"].text
        and "photos.zip: neither" in found["decode"].text
    )


def test_captions_that_the_base_model_does_not_read_to_their_end_are_counted(
    site: dict[str, str], tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    rows = [json.loads(line) for line in (photos / "metadata.jsonl").read_text().splitlines()]
    rows[0]["text"], rows[1]["text"] = "rose " * 22, "rose " * 23  # 24 and 25 tokens, of 24
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    privacy.declare_public(photos, data.scan(photos).photos)
    line = lines(site, "model", "decode")["decode"]
    assert line.state == "warn" and "captions are longer than the 24 tokens" in line.text
    assert f"1 of {len(rows)} captions" in line.text


def test_an_optimizer_whose_library_the_site_lacks_fails_before_the_step(
    site: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(optimisers.LIBRARIES, "adamw-8bit", "nobodys_bits")
    found = lines(site, "step", RUN_CONFIG=f'{RUN} optimizer="adamw-8bit"')
    assert found["model"].text.startswith("SITE-16  The site lacks nobodys_bits")
    assert "pip install -c constraints.txt nobodys_bits" in found["model"].fix
    assert {name: found[name].state for name in ("model", "memory", "decode", "step")} == {
        "model": "fail", "memory": "skip", "decode": "pass", "step": "skip",
    }  # fmt: skip


def test_limits_with_a_slip_are_named_before_a_site_joins(site: dict[str, str]) -> None:
    with pytest.raises(BouquetError, match="TRUST-04"):
        Settings.read(site | {"SITE_LIMITS": "max-local-step=5"})


def test_a_cache_that_cannot_be_written_fails(site: dict[str, str], tmp_path: Path) -> None:
    assert lines(site, "disk", BOUQUET_CACHE=str(tmp_path / "absent"))["disk"].text.startswith("CHECK-08")


def test_a_key_that_others_may_read_is_admitted_with_a_warning(
    federation: Processes, site: dict[str, str], tmp_path: Path
) -> None:
    key = tmp_path / "open.key"
    key.write_bytes((federation.certs / "site-1.key").read_bytes())
    key.chmod(0o644)
    line = lines(site, "key", HUB=federation.address, CA=str(federation.certs / "ca.crt"), SITE_KEY=str(key))["key"]
    assert line.state == "warn" and line.fix == f"chmod 600 {key}"


def test_an_estimate_that_fails_warns_and_leaves_the_answer_to_the_step(
    site: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise IndexError("tuple index out of range")

    monkeypatch.setattr("bouquet.site.estimate.estimate", fail)
    shown = lines(site, "step")
    assert (
        shown["memory"].state == "warn"
        and "cannot be estimated (IndexError: tuple index out of range)" in shown["memory"].text
    )
    assert "GiB of RAM free" in shown["memory"].text and "training step" in shown["memory"].fix
    assert shown["step"].state == "pass"


def test_a_base_model_whose_configs_are_odd_is_no_reason_to_fail(site: dict[str, str], tmp_path: Path) -> None:
    file = Path(shutil.copytree(tiny.base(), tmp_path / "models/tiny")) / "vae/config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in settings.items() if key != "block_out_channels"}))
    assert lines(site, "memory", BOUQUET_MODELS=str(tmp_path / "models"), BASE_FINGERPRINT="")["memory"].state == "warn"


def test_a_tokenizer_without_a_length_passes_the_estimate_and_the_step(site: dict[str, str], tmp_path: Path) -> None:
    file = Path(shutil.copytree(tiny.base(), tmp_path / "models/tiny")) / "tokenizer/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 10**30}))
    shown = lines(site, "step", BOUQUET_MODELS=str(tmp_path / "models"), BASE_FINGERPRINT="")
    assert (shown["memory"].state, shown["step"].state) == ("pass", "pass")


# --- gradient checkpointing
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "on"),
    [("1", True), ("true", True), ("True", True), ("", False), ("0", False), ("false", False), (None, False)],
)
def test_a_site_may_force_gradient_checkpointing_and_never_forbids_it(
    site: dict[str, str], value: str | None, on: bool
) -> None:
    env = site | ({} if value is None else {"SITE_CHECKPOINTING": value})
    assert Settings.read(env).config.gradient_checkpointing is on
    assert (
        Settings.read(env | {"RUN_CONFIG": f"{RUN} gradient-checkpointing=true"}).config.gradient_checkpointing is True
    )


def test_a_switch_that_is_neither_on_nor_off_ends_the_preflight_with_its_name(
    site: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("SITE_CHECKPOINTING", "yes")
    assert cli.main(["site", "check"]) == 1
    shown = capsys.readouterr().out
    assert "CHECK-09" in shown and "SITE_CHECKPOINTING=yes" in shown


@pytest.mark.slow
def test_a_forced_checkpointing_takes_less_memory_in_the_estimate_and_is_in_the_step(
    site: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointed, fit = [], train.fit
    monkeypatch.setattr(
        train, "fit", lambda unet, *rest: checkpointed.append(unet.is_gradient_checkpointing) or fit(unet, *rest)
    )
    both = [Preflight(Settings.read(site | {"SITE_CHECKPOINTING": value})) for value in ("", "1")]
    for checks in both:
        checks.check_model(), checks.check_data()
    without, forced = (
        trial.estimated(checks.own.config, checks.base, on_gpu=False, photos=checks.photos) for checks in both
    )
    assert forced.floor < without.floor
    assert lines(site, "step", SITE_CHECKPOINTING="1")["step"].state == "pass" and set(checkpointed) == {True}


# --- the GPU
# -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


def test_the_pinned_gpu_alone_passes_and_a_second_visible_one_fails(nvml: StandIn, site: dict[str, str]) -> None:
    nvml.state(A10)
    assert lines(site, "gpu", SITE_GPU="GPU-aaaa1111")["gpu"].text.startswith("NVIDIA A10 GPU-aaaa1111")
    nvml.state(A10, T4)
    assert lines(site, "gpu", SITE_GPU="GPU-aaaa1111")["gpu"].text.startswith("GPU-03")


def test_a_wrong_uuid_stops_what_would_use_the_gpu_and_nothing_else(nvml: StandIn, site: dict[str, str]) -> None:
    nvml.state(A10)
    shown = lines(site, "step", "others", SITE_GPU="GPU-cccc3333")
    assert {name for name, line in shown.items() if line.state in ("fail", "skip")} == {
        "gpu",
        "driver",
        "others",
        "memory",
        "step",
    }
    assert shown["gpu"].text.startswith("GPU-02")


def test_a_pin_of_several_gpus_is_refused_before_the_driver_is_asked(site: dict[str, str]) -> None:
    line = lines(site, "gpu", SITE_GPU="0,1")["gpu"]
    assert line.text.splitlines() == ["GPU-06  A site trains on one GPU.", "SITE_GPU=0,1"]
    assert "scripts/add-site" in line.fix and "invitation" in line.fix


def test_dockers_pin_counts_where_the_site_gives_none(nvml: StandIn, site: dict[str, str]) -> None:
    nvml.state(A10)
    del site["SITE_GPU"]
    assert lines(site, "gpu", NVIDIA_VISIBLE_DEVICES="GPU-cccc3333")["gpu"].text.startswith("GPU-02")


def test_a_driver_older_than_the_images_cuda_fails(
    nvml: StandIn, site: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    nvml.state(A10, driver="535.183.01 12020")
    assert lines(site, "driver", SITE_GPU="0")["driver"].text.startswith("GPU-04")
    nvml.state(A10, driver="580.95.05 13000")
    assert lines(site, "driver", SITE_GPU="0")["driver"].state == "pass"


def test_a_gpu_whose_memory_is_full_fails_before_the_step(nvml: StandIn, site: dict[str, str]) -> None:
    nvml.state(gpu(total=24576, free=0))
    line = lines(site, "memory", SITE_GPU="0")["memory"]
    assert line.text.startswith("GPU-05") and "0.0 GiB free" in line.text


def test_a_gpu_with_little_left_warns_that_it_is_tight(nvml: StandIn, site: dict[str, str]) -> None:
    nvml.state(gpu(total=24576, free=500))
    line = lines(site, "memory", SITE_GPU="0")["memory"]
    assert line.state == "warn" and "0.5 GiB free" in line.text


def test_another_process_on_the_gpu_warns_and_so_does_one_that_cannot_be_seen(
    nvml: StandIn, site: dict[str, str]
) -> None:
    nvml.state(gpu(total=24576, free=20000, processes="4711:4000"))
    assert "process 4711 4000 MiB" in lines(site, "others", SITE_GPU="0")["others"].text
    nvml.state(gpu(total=24576, free=20000))
    assert "cannot be seen from here" in lines(site, "others", SITE_GPU="0")["others"].text
    nvml.state(gpu(total=24576, free=24000))
    assert lines(site, "others", SITE_GPU="0")["others"].state == "pass"


def test_a_step_that_runs_out_of_gpu_memory_says_what_to_ask_for(
    site: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("app.site.train.fit", full)
    line = lines(site, "step")["step"]
    assert (
        line.text.startswith("GPU-05")
        and "Tried to allocate 2.00 GiB" in line.text
        and "smaller batch-size" in line.fix
    )
