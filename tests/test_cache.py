"""Encoded once: what is encoded, what is kept, and what makes it be encoded again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from app import model
from app.errors import ModelError, SiteError
from app.site import cache
from app.site.photos import data
from app.site.photos.views import Plan
from tests.kit import tiny

CPU = torch.device("cpu")


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """The names of the models loaded, one entry a load."""
    seen: list[str] = []
    for library, name in ((diffusers, "AutoencoderKL"), (transformers, "CLIPTextModel")):
        kind = getattr(library, name)
        load = kind.from_pretrained
        monkeypatch.setattr(
            kind, "from_pretrained", lambda *a, _load=load, _name=name, **k: seen.append(_name) or _load(*a, **k)
        )
    return seen


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The names of the photos decoded, one entry a decode."""
    seen: list[str] = []
    decode = cache.pixels_of
    monkeypatch.setattr(
        cache, "pixels_of", lambda photo, resolution: seen.append(photo.name) or decode(photo, resolution)
    )
    return seen


def encode(folder: Path, kept: Path, resolution: int = 16, **sums: str):
    """(partition, the encoded rows of all its photos)."""
    everything = model.fingerprint(tiny.base()) | sums
    partition, rows = cache.encode(data.scan(folder), tiny.base(), everything, Plan.square(resolution), kept, CPU)
    return partition, rows(partition.photos)


def cut_off(path: Path) -> None:
    """Leave a picture its header and half of its pixels."""
    path.write_bytes(path.read_bytes()[:500])


@pytest.fixture
def folder(tmp_path) -> Path:
    return tiny.site(tmp_path / "data", count=6)


@pytest.fixture
def kept(tmp_path) -> Path:
    return tmp_path / "cache"


def test_latents_are_the_autoencoders_mean_times_its_scaling_factor(folder, kept):
    partition, encoded = encode(folder, kept)
    vae = diffusers.AutoencoderKL.from_pretrained(tiny.base(), subfolder="vae")
    for photo, latent in zip(partition.photos, encoded.latents_NChw, strict=True):
        with torch.no_grad():
            # the tiny model's scaling factor
            direct = vae.encode(data.pixels(photo, 16)[None]).latent_dist.mean[0] * 0.5
        torch.testing.assert_close(latent, direct, rtol=1e-4, atol=1e-5)
    assert encoded.latents_NChw.shape == (6, 4, 8, 8) and encoded.latents_NChw.dtype == torch.float32


def test_text_is_what_the_pipeline_itself_would_give_the_unet(folder, kept):
    partition, encoded = encode(folder, kept)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny.base(), safety_checker=None)
    with torch.no_grad():
        direct, blank = pipe.encode_prompt([p.caption for p in partition.photos], CPU, 1, True)
    torch.testing.assert_close(encoded.text_NTD, direct, rtol=1e-3, atol=1e-3)  # kept in float16
    torch.testing.assert_close(encoded.blank_TD, blank[0], rtol=1e-3, atol=1e-3)
    assert encoded.text_NTD.dtype == encoded.blank_TD.dtype == torch.float32


def test_rows_come_in_the_order_asked_for(folder, kept):
    partition, everything = encode(folder, kept)
    _, rows = cache.encode(data.scan(folder), tiny.base(), model.fingerprint(tiny.base()), Plan.square(16), kept, CPU)
    turned = rows(partition.photos[::-1])
    assert turned.keys == everything.keys[::-1]
    assert torch.equal(turned.latents_NChw, everything.latents_NChw.flip(0))
    assert torch.equal(turned.text_NTD, everything.text_NTD.flip(0))


def test_the_second_time_nothing_is_loaded_or_decoded_and_the_rows_are_the_same(folder, kept, loads, decoded):
    _, first = encode(folder, kept)
    assert loads == ["AutoencoderKL", "CLIPTextModel"] and len(decoded) == 6
    loads.clear(), decoded.clear()
    _, second = encode(folder, kept)
    assert loads == decoded == []
    assert torch.equal(first.latents_NChw, second.latents_NChw) and torch.equal(first.text_NTD, second.text_NTD)


def test_a_changed_photo_is_encoded_again_and_no_other(folder, kept, decoded, tmp_path):
    encode(folder, kept)
    decoded.clear()
    (folder / "0003.png").write_bytes((tiny.site(tmp_path / "other", count=1, seed=9) / "0000.png").read_bytes())
    _, encoded = encode(folder, kept)
    assert decoded == ["0003.png"] and len(encoded.keys) == 6


def test_a_renamed_photo_is_not_encoded_again(folder, kept, loads):
    encode(folder, kept)
    loads.clear()
    (folder / "0003.png").rename(folder / "rose.png")
    listed = (folder / "metadata.jsonl").read_text().replace("0003.png", "rose.png")
    (folder / "metadata.jsonl").write_text(listed)
    encode(folder, kept)
    assert loads == []


def test_a_changed_caption_loads_the_text_encoder_and_not_the_autoencoder(folder, kept, loads):
    _, before = encode(folder, kept)
    loads.clear()
    (folder / "metadata.jsonl").write_text((folder / "metadata.jsonl").read_text().replace("red poppy", "blue poppy"))
    _, after = encode(folder, kept)
    assert loads == ["CLIPTextModel"]
    assert torch.equal(before.latents_NChw, after.latents_NChw) and not torch.equal(before.text_NTD, after.text_NTD)


def test_another_autoencoder_encodes_all_photos_again_and_no_caption(folder, kept, loads, decoded):
    encode(folder, kept)
    loads.clear(), decoded.clear()
    encode(folder, kept, vae="f" * 64)
    assert loads == ["AutoencoderKL"] and len(decoded) == 6


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_another_text_encoder_or_tokenizer_encodes_captions_again_and_no_photo(folder, kept, loads, part):
    encode(folder, kept)
    loads.clear()
    encode(folder, kept, **{part: "f" * 64})
    assert loads == ["CLIPTextModel"]


def test_another_unet_encodes_nothing_again(folder, kept, loads):
    encode(folder, kept)
    loads.clear()
    encode(folder, kept, unet="f" * 64)
    assert loads == []


def test_each_resolution_is_kept_by_itself(folder, kept, loads):
    encode(folder, kept)
    _, larger = encode(folder, kept, resolution=32)
    assert larger.latents_NChw.shape == (6, 4, 16, 16)
    loads.clear()
    encode(folder, kept)
    encode(folder, kept, resolution=32)
    assert loads == []


def test_photos_are_encoded_few_at_a_time_where_they_are_large(folder, kept, monkeypatch, capsys):
    monkeypatch.setattr(cache, "PIXELS", 2 * 16**2)
    _, few = encode(folder, kept)
    assert capsys.readouterr().out.splitlines() == [f"bouquet: encoded {n}/6 photos" for n in (2, 4, 6)]
    monkeypatch.setattr(cache, "PIXELS", 1)
    _, one = encode(folder, kept.with_name("other"))
    assert len(capsys.readouterr().out.splitlines()) == 6  # and ten at most
    torch.testing.assert_close(one.latents_NChw, few.latents_NChw, rtol=1e-4, atol=1e-5)


def test_an_undecodable_photo_is_set_aside_and_counted_and_the_others_go_on(folder, kept):
    cut_off(folder / "0002.png")
    partition, encoded = encode(folder, kept)
    assert partition.counts == {"images": 5, "undecodable": 1}
    assert partition.quarantined == (("0002.png", "undecodable"),)
    assert len(encoded.keys) == 5


def test_an_undecodable_photo_is_remembered_and_not_decoded_again(folder, kept, loads):
    cut_off(folder / "0002.png")
    encode(folder, kept)
    loads.clear()
    partition, _ = encode(folder, kept)
    assert loads == [] and partition.counts == {"images": 5, "undecodable": 1}


def test_a_photo_that_was_out_of_reach_for_a_moment_is_tried_again(folder, kept):
    partition = data.scan(folder)
    moved = (folder / "0002.png").rename(folder / ".hidden")
    sums = model.fingerprint(tiny.base())
    assert cache.encode(partition, tiny.base(), sums, Plan.square(16), kept, CPU)[0].counts == {
        "images": 5,
        "unreadable": 1,
    }
    moved.rename(folder / "0002.png")
    assert cache.encode(partition, tiny.base(), sums, Plan.square(16), kept, CPU)[0].counts == {"images": 6}


def test_too_few_decodable_photos_are_refused_without_their_names(folder, kept):
    for number in range(5):
        cut_off(folder / f"000{number}.png")
    with pytest.raises(SiteError) as caught:
        encode(folder, kept)
    assert caught.value.code == "SITE-02" and "undecodable" in caught.value.found
    assert str(caught.value) == "SITE-02  Too few training images."


@pytest.mark.parametrize("size", [0, 5, 300])
def test_a_cache_file_that_was_cut_off_is_made_again(folder, kept, size):
    _, first = encode(folder, kept)
    for path in kept.iterdir():
        data = path.read_bytes()[:size]
        path.unlink()  # `first` has the whole one mapped, and a file that shrinks under its reader ends the process
        path.write_bytes(data)
    _, again = encode(folder, kept)
    assert torch.equal(first.latents_NChw, again.latents_NChw) and torch.equal(first.text_NTD, again.text_NTD)


def test_the_cache_is_rid_of_photos_that_are_gone_once_it_is_written_again(folder, kept, tmp_path):
    encode(folder, kept)
    partition, _ = encode(tiny.site(tmp_path / "new", count=3, seed=5), kept)
    (latents,) = kept.glob("latents-*")
    assert {name.split()[0] for name in cache.read_rows(latents)[0]} == {photo.key for photo in partition.photos}


def test_the_cache_holds_no_caption_and_no_file_name(folder, kept):
    encode(folder, kept)
    names = [path.name for path in kept.iterdir()]
    assert len(names) == 2 and all(name.endswith(".safetensors") for name in names)
    everything = b"".join(path.read_bytes() for path in kept.iterdir())
    for row in map(json.loads, (folder / "metadata.jsonl").read_text().splitlines()):
        assert row["text"].encode() not in everything and row["file_name"].encode() not in everything


# --- a site that is killed while it encodes
# ---------------------------------------------------------------------------------


@pytest.fixture
def one_by_one(monkeypatch):
    """Photos encoded one at a time, and two written down at a time."""
    monkeypatch.setattr(cache, "PIXELS", 1)
    monkeypatch.setattr(cache, "PART", 2)


def killed_at(monkeypatch, number: int) -> None:
    """End the process when it comes to that photo, the first being 0; the next process has no such end."""
    decode, seen = cache.pixels_of, []

    def end(photo, resolution):
        seen.append(photo)
        if len(seen) > number:
            monkeypatch.setattr(cache, "pixels_of", decode)
            raise KeyboardInterrupt
        return decode(photo, resolution)

    monkeypatch.setattr(cache, "pixels_of", end)


def test_a_killed_site_goes_on_where_it_was(folder, kept, tmp_path, monkeypatch, one_by_one):
    _, whole = encode(folder, tmp_path / "whole")
    killed_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        encode(folder, kept)
    decode, decoded = cache.pixels_of, []
    monkeypatch.setattr(
        cache, "pixels_of", lambda photo, resolution: decoded.append(photo.name) or decode(photo, resolution)
    )
    _, again = encode(folder, kept)
    assert decoded == ["0004.png", "0005.png"]  # two twos were written down, the fifth was not
    assert torch.equal(again.latents_NChw, whole.latents_NChw) and again.keys == whole.keys
    assert sorted(path.name.split("-")[0] for path in kept.iterdir()) == ["latents", "text"]  # and the parts are gone


def test_a_killed_site_keeps_what_it_found_undecodable(folder, kept, monkeypatch, one_by_one):
    cut_off(folder / "0000.png")
    killed_at(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        encode(folder, kept)
    decode, decoded = cache.pixels_of, []
    monkeypatch.setattr(
        cache, "pixels_of", lambda photo, resolution: decoded.append(photo.name) or decode(photo, resolution)
    )
    assert encode(folder, kept)[0].counts == {"images": 5, "undecodable": 1}
    assert decoded == ["0004.png", "0005.png"]


def test_a_part_that_was_torn_is_noticed_and_encoded_again(folder, kept, tmp_path, monkeypatch, one_by_one, capsys):
    _, whole = encode(folder, tmp_path / "whole")
    killed_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        encode(folder, kept)
    first, _ = sorted(kept.glob("*.part*"))
    first.write_bytes(first.read_bytes()[:-1])
    _, again = encode(folder, kept)
    assert f"{first.name} is damaged" in capsys.readouterr().out
    assert torch.equal(again.latents_NChw, whole.latents_NChw)


def test_a_site_killed_between_the_last_part_and_the_whole_encodes_nothing_again(
    folder, kept, monkeypatch, loads, one_by_one
):
    write = cache.write_rows
    monkeypatch.setattr(
        cache, "write_rows", lambda path, *what: write(path, *what) if ".part" in path.name else cut_short()
    )

    def cut_short():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(folder, kept)
    loads.clear()
    monkeypatch.setattr(cache, "write_rows", write)
    assert len(encode(folder, kept)[1].keys) == 6 and loads == ["CLIPTextModel"]


# --- what another version kept, and what must not be kept
# -------------------------------------------------------------------


@pytest.mark.parametrize("kind, name", [("latents-", "AutoencoderKL"), ("text-", "CLIPTextModel")])
def test_what_the_version_before_kept_is_encoded_again_and_removed(folder, kept, loads, kind, name):
    encode(folder, kept)
    (now,) = kept.glob(f"{kind}*")
    before = now.rename(now.with_name(now.name.rpartition("-")[0] + ".safetensors"))
    loads.clear()
    encode(folder, kept)
    assert loads == [name] and now.exists() and not before.exists()


def test_another_reading_of_pictures_encodes_all_photos_again(folder, kept, loads, monkeypatch):
    encode(folder, kept)
    loads.clear()
    monkeypatch.setattr(cache, "READING", 99)
    encode(folder, kept)
    assert loads == ["AutoencoderKL"]


@pytest.mark.parametrize("part, layer", [("vae", "encoder.conv_in"), ("text_encoder", "final_layer_norm")])
def test_numbers_that_are_not_finite_are_refused_and_not_kept(folder, kept, tmp_path, part, layer):
    """Weights that are finite, and too large for what is computed with them, as those of a VAE made for 16 bits."""
    base = shutil.copytree(tiny.base(), tmp_path / "base")
    (file,) = (base / part).glob("*.safetensors")
    tensors = load_file(file)
    assert f"{layer}.weight" in tensors
    save_file(
        tensors | {f"{layer}.weight": torch.full_like(tensors[f"{layer}.weight"], 3e38)},
        file,
        metadata={"format": "pt"},
    )
    with pytest.raises(ModelError, match="^MODEL-06") as caught:
        cache.encode(data.scan(folder), base, model.fingerprint(base), Plan.square(16), kept, CPU)
    assert part in caught.value.found and str(tmp_path) not in str(caught.value)
    assert not list(kept.glob("latents-*" if part == "vae" else "text-*"))


# --- captions that are cut
# ------------------------------------------------------------------------------------------------


def test_captions_longer_than_the_model_reads_are_counted_also_when_they_are_kept(folder, kept):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    fits, over = "rose " * 22, "rose " * 23  # with its beginning and end 24 tokens, and 25, of the tiny model's 24
    for row, text in zip(rows, (fits, over, over, "a", f"{over} red", "b"), strict=True):
        row["text"] = text
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [encode(folder, kept)[0].cut for _ in range(2)] == [3, 3]
    partition = encode(folder, kept)[0]
    said = "3 of 6 captions are longer than the 24 tokens that this base model reads; the rest is not learned"
    assert said in partition.report() and "captions" not in partition.counts
    assert cache.counted(data.scan(folder), tiny.base()) == partition
