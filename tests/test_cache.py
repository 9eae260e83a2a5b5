"""Encoded once: what is encoded, what is kept, and what makes it be encoded again."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
import transformers

from app import cache, data, model
from app.errors import SiteError
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """The names of the models loaded, one entry a load."""
    seen: list[str] = []
    for library, name in ((diffusers, "AutoencoderKL"), (transformers, "CLIPTextModel")):
        kind = getattr(library, name)
        load = kind.from_pretrained
        monkeypatch.setattr(kind, "from_pretrained", lambda *a, _load=load, _name=name, **k: seen.append(_name) or _load(*a, **k))
    return seen


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The names of the photos decoded, one entry a decode."""
    seen: list[str] = []
    decode = cache.pixels_of
    monkeypatch.setattr(cache, "pixels_of", lambda photo, resolution: seen.append(photo.name) or decode(photo, resolution))
    return seen


def encode(folder: Path, kept: Path, resolution: int = 16, **sums: str):
    """(partition, the encoded rows of all its photos)."""
    everything = model.fingerprint(tiny.base()) | sums
    partition, rows = cache.encode(data.scan(folder), tiny.base(), everything, resolution, kept, CPU)
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
            direct = vae.encode(data.pixels(photo, 16)[None]).latent_dist.mean[0] * 0.5  # the tiny model's scaling factor
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
    _, rows = cache.encode(data.scan(folder), tiny.base(), model.fingerprint(tiny.base()), 16, kept, CPU)
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
    assert cache.encode(partition, tiny.base(), sums, 16, kept, CPU)[0].counts == {"images": 5, "unreadable": 1}
    moved.rename(folder / "0002.png")
    assert cache.encode(partition, tiny.base(), sums, 16, kept, CPU)[0].counts == {"images": 6}


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
        path.write_bytes(path.read_bytes()[:size])
    _, again = encode(folder, kept)
    assert torch.equal(first.latents_NChw, again.latents_NChw) and torch.equal(first.text_NTD, again.text_NTD)


def test_the_cache_is_rid_of_photos_that_are_gone_once_it_is_written_again(folder, kept, tmp_path):
    encode(folder, kept)
    partition, _ = encode(tiny.site(tmp_path / "new", count=3, seed=5), kept)
    (latents,) = kept.glob("latents-*")
    assert cache._read(latents)[0].keys() == {photo.key for photo in partition.photos}


def test_the_cache_holds_no_caption_and_no_file_name(folder, kept):
    encode(folder, kept)
    names = [path.name for path in kept.iterdir()]
    assert len(names) == 2 and all(name.endswith(".safetensors") for name in names)
    everything = b"".join(path.read_bytes() for path in kept.iterdir())
    for row in map(json.loads, (folder / "metadata.jsonl").read_text().splitlines()):
        assert row["text"].encode() not in everything and row["file_name"].encode() not in everything
