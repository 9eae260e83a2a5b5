"""What the hub takes from a site, what it refuses, and the mean of the rest worked out by hand."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from app import metrics, model, wire
from app.errors import AdapterError, BouquetError, HubError
from app.hub import guard, history
from tests.kit import tiny

SENT = tiny.adapter(0)
HASH = model.adapter_hash(SENT)


@pytest.fixture(autouse=True)
def hub(monkeypatch) -> None:
    tiny.be_the_hub(monkeypatch)


def message(content: RecordDict | Error) -> Message:
    order = Message(RecordDict(), dst_node_id=77, message_type="train")
    return Message(content, reply_to=order)


def content(adapter: model.Adapter | None = None, applied: str = HASH, site: str = "site-1", **metrics) -> RecordDict:
    """A good reply, with metrics replaced (None takes one away)."""
    numbers = {"num-examples": 10, "train-loss": 0.5, "validation-loss": 0.4} | {
        k.replace("_", "-"): v for k, v in metrics.items()
    }
    record = RecordDict({"metrics": MetricRecord({k: v for k, v in numbers.items() if v is not None})})
    record["info"] = ConfigRecord({"site": site, "applied": applied})
    if adapter is not None:
        record["arrays"] = wire.pack(adapter)
    return record


def accept(record: RecordDict | Error, training: bool = True) -> guard.Reply:
    return guard.accept(message(record), SENT, HASH, training=training)


def refused(
    record: RecordDict | Error, code: str, kind: type[BouquetError] = HubError, training: bool = True
) -> BouquetError:
    with pytest.raises(kind) as caught:
        accept(record, training)
    assert caught.value.code == code
    return caught.value


def reply(site: str, images: int, seed: int) -> guard.Reply:
    return guard.Reply(site, tiny.adapter(seed), images, {"train-loss": float(seed)})


# --- the guard
# ---------------------------------------------------------------------------------------------------------


def test_a_good_reply_is_taken_as_it_came():
    got = accept(content(tiny.adapter(1), site="garden", seconds_train=3.5))
    assert (got.site, got.images) == ("garden", 10)
    assert got.metrics == {"num-examples": 10, "train-loss": 0.5, "validation-loss": 0.4, "seconds-train": 3.5}
    assert tiny.equal(got.adapter, tiny.adapter(1))


def test_a_site_without_a_name_goes_by_its_nodes_number():
    record = content(tiny.adapter(1))
    record["info"] = ConfigRecord({"applied": HASH})
    assert accept(record).site == "77"


def test_an_evaluation_needs_no_adapter_and_a_training_does():
    assert accept(content(), training=False).adapter is None
    missing = refused(content(), "ADAPTER-01", AdapterError)
    assert f"{len(SENT)} keys missing" in missing.found


def test_an_adapter_sent_with_an_evaluation_is_not_looked_at():
    assert accept(content({"x": torch.tensor([math.nan])}), training=False).adapter is None


def test_an_error_reply_gives_the_sites_public_sentence():
    error = refused(Error(code=100, reason="SITE-01  No training images."), "HUB-04")
    assert str(error) == "HUB-04  The site could not take part: SITE-01 No training images."


def test_flowers_wrapping_of_an_exception_is_taken_off():
    error = refused(Error(code=2, reason="<class 'app.errors.SiteError'>:<'SITE-01  No training images.'>"), "HUB-04")
    assert str(error).endswith("could not take part: SITE-01 No training images.")


def test_an_error_without_a_reason_goes_by_its_code():
    assert str(refused(Error(code=5), "HUB-04")).endswith("error code 5")


def test_a_sites_text_is_one_line_of_bounded_length():
    error = refused(Error(code=100, reason="bad\nbouquet: finished\r\t" + "x" * 10_000), "HUB-04")
    assert "\n" not in str(error) and "\r" not in str(error) and len(str(error)) < 400
    assert accept(content(tiny.adapter(1), site="a\nb" + "c" * 10_000)).site == "a b" + "c" * 77


@pytest.mark.parametrize("name", ["train-loss", "validation-loss", "num-examples"])
@pytest.mark.parametrize("value", [math.nan, math.inf, None, [1, 2]])
def test_a_metric_that_is_missing_or_no_finite_number_is_refused_by_name(name, value):
    assert name in refused(content(tiny.adapter(1), **{name: value}), "HUB-05").found


@pytest.mark.parametrize("images", [0, -9, 1e300, 10.0, 10**9])
def test_a_number_of_images_that_cannot_be_is_refused(images):
    assert "num-examples" in refused(content(tiny.adapter(1), num_examples=images), "HUB-05").found


def test_a_yes_is_not_a_number_of_images():
    record = content(tiny.adapter(1))
    record["metrics"].__dict__["_data"]["num-examples"] = True  # Flower's own check refuses it at an honest site
    refused(record, "HUB-05")


def test_other_metrics_that_are_no_finite_numbers_are_left_out():
    got = accept(content(tiny.adapter(1), odd=math.nan, many=[1.0, 2.0], photos_undecodable=2))
    assert set(got.metrics) == {"num-examples", "train-loss", "validation-loss", "photos-undecodable"}


@pytest.mark.parametrize(("name", "value"), [
    ("validation-loss", 1e308), ("train-loss", -0.1), ("num-examples", 10**9), ("num-examples", 7.0),
    ("validation-loss", True), ("train-loss", 10**25),
])  # fmt: skip
def test_a_needed_number_out_of_its_range_is_refused_by_name(name, value):
    record = content(tiny.adapter(1))
    record["metrics"].__dict__["_data"][name] = value
    assert name in refused(record, "HUB-05").found


def test_what_no_site_of_this_version_sends_or_cannot_be_true_is_left_out_and_counted():
    names = {f"x{n}": 1.0 for n in range(5000)} | {"../../../x": 1.0, "<script>": 2.0, "photos-<b>": 1}
    false = {"seconds-train": -1.0, "gpu-utilisation": 101.0, "gpu-joules": 1e300, "photos-empty": 10**10}
    got = accept(content(tiny.adapter(1), **names, **false, seconds_load=2.5, photos_duplicate=3))
    needed = {"num-examples": 10, "train-loss": 0.5, "validation-loss": 0.4}
    assert got.metrics == needed | {"seconds-load": 2.5, "photos-duplicate": 3}
    assert got.left_out == 5003 + 4


@pytest.mark.parametrize("odd", [7, b"\x1b[2J", ["a", "b"], 1.5])
def test_a_name_that_is_no_text_is_none(odd):
    record = content(tiny.adapter(1))
    record["info"] = ConfigRecord({"site": odd, "applied": HASH, "gpu": odd})
    got = accept(record)
    assert (got.site, got.gpu) == ("77", "")
    record["info"]["applied"] = odd
    refused(record, "ADAPTER-03", AdapterError)


def test_a_reply_without_any_records_is_refused():
    refused(RecordDict(), "HUB-05")


@pytest.mark.parametrize("applied", ["", "0" * 64, HASH[:-1], HASH.upper()])
@pytest.mark.parametrize("training", [True, False])
def test_a_site_that_applied_another_adapter_is_refused(applied, training):
    refused(content(tiny.adapter(1), applied=applied), "ADAPTER-03", AdapterError, training)


def test_other_keys_are_refused():
    renamed = {key.replace(".lora_A.", ".lora_A.default."): value for key, value in tiny.adapter(1).items()}
    refused(content(renamed), "ADAPTER-01", AdapterError)


def test_a_shape_that_would_broadcast_is_refused():
    adapter = tiny.adapter(1)
    adapter[sorted(adapter)[0]] = torch.ones(1)
    refused(content(adapter), "ADAPTER-01", AdapterError)


def test_an_adapter_that_is_not_finite_is_refused():
    adapter = tiny.adapter(1)
    adapter[sorted(adapter)[0]].view(-1)[0] = math.nan
    refused(content(adapter), "ADAPTER-02", AdapterError)


def test_double_precision_is_refused():
    refused(content({key: value.double() for key, value in tiny.adapter(1).items()}), "ADAPTER-01", AdapterError)


@pytest.mark.parametrize("data", [b"", b"no array", b"\x93NUMPY\x01\x00\xff\xff{"])
def test_bytes_that_are_no_array_are_refused(data):
    record = content()
    record["arrays"] = ArrayRecord(
        {wire.NAME: Array(dtype="uint8", shape=(len(data),), stype="numpy.ndarray", data=data)}
    )
    refused(record, "ADAPTER-01", AdapterError)


def test_a_pickle_in_place_of_an_array_is_not_opened(tmp_path):
    class Touch:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    out = io.BytesIO()
    np.save(out, np.array([Touch()], dtype=object), allow_pickle=True)
    record = content()
    record["arrays"] = ArrayRecord(
        {wire.NAME: Array(dtype="object", shape=(1,), stype="numpy.ndarray", data=out.getvalue())}
    )
    refused(record, "ADAPTER-01", AdapterError)
    assert not (tmp_path / "opened").exists()


def test_no_refusals_public_sentence_repeats_what_a_site_sent():
    for record in (
        content(tiny.adapter(1), applied="secret"),
        content({"secret": torch.zeros(1)}),
        content(num_examples=-9),
    ):
        with pytest.raises(BouquetError) as caught:
            accept(record)
        assert "secret" not in str(caught.value) and "-9" not in str(caught.value)


def test_a_registered_site_goes_by_the_name_the_hub_gave_it_whatever_it_says():
    got = guard.accept(message(content(tiny.adapter(1), site="site-2")), SENT, HASH, training=True, site="site-1")
    assert got.site == "site-1"


# --- the length of updates
# ----------------------------------------------------------------------------------------------


def of_length(site: str, norm: float) -> guard.Reply:
    return guard.Reply(site, None, 10, {}, norm)


def test_an_updates_length_is_that_of_the_difference():
    old, new = (
        {"a": torch.tensor([1.0, 1.0]), "b": torch.zeros(1)},
        {
            "a": torch.tensor([4.0, 1.0]),
            "b": torch.tensor([4.0]),
        },
    )
    assert guard.update_norm(new, old) == 5.0  # 3, 0 and 4
    assert accept(content(tiny.adapter(1))).norm == pytest.approx(
        math.sqrt(sum(((tiny.adapter(1)[k] - v) ** 2).sum().item() for k, v in SENT.items()))
    )


@pytest.mark.parametrize(
    ("norms", "earlier", "refused"),
    [
        ([1.0, 1.2, 5.9], [], []),  # 5.9 <= 5 x 1.2
        ([1.0, 1.2, 6.1], [], ["c"]),
        ([1.0, 1e6], [], ["b"]),  # of two, the larger is measured by the smaller
        ([1e6], [], []),  # one alone has nothing to be measured by
        ([1e6], [1.0, 1.1, 0.9], ["a"]),  # but what was accepted before
        ([0.1, 0.1], [9.0, 9.0], []),  # a short update is no danger
    ],
)
def test_an_update_far_longer_than_the_median_one_is_refused(norms, earlier, refused):
    replies = [of_length(site, norm) for site, norm in zip("abc", norms, strict=False)]
    kept, out = guard.guard_norms(replies, earlier, 5.0)
    assert [reply.site for reply, _ in out] == refused and [r.site for r in kept] == [
        r.site for r in replies if r.site not in refused
    ]
    assert all(reason.startswith("ADAPTER-04  The update is ") for _, reason in out)


def test_without_a_bound_every_length_is_taken():
    assert len(guard.guard_norms([of_length("a", 1.0), of_length("b", 1e9)], [], 0.0)[0]) == 2


# --- weights
# -------------------------------------------------------------------------------------------------------------


def weights(images: dict[str, int], admitted: dict[str, int] | None = None, share: float = 0.8) -> dict[str, int]:
    replies = [guard.Reply(site, None, count, {}) for site, count in images.items()]
    return {r.site: r.images for r in guard.weigh(replies, admitted or {}, share)}


def test_a_site_weighs_no_more_than_it_was_admitted_with():
    assert weights({"a": 100, "b": 90}, {"a": 60, "c": 1}) == {"a": 60, "b": 90}


def test_one_site_weighs_at_most_its_largest_share():
    assert weights({"a": 1000, "b": 60, "c": 40}) == {"a": 400, "b": 60, "c": 40}  # 400 of 500 is 0.8
    assert weights({"a": 10**9 - 1, "b": 10}, share=0.5) == {"a": 10, "b": 10}


def test_shares_below_the_largest_stay_as_they_are():
    assert weights({"a": 300, "b": 100}) == {"a": 300, "b": 100}
    assert weights({"a": 1000}) == {"a": 1000}
    assert weights({"a": 1000, "b": 1}, share=1.0) == {"a": 1000, "b": 1}


def test_what_a_site_counts_for_says_why_when_it_is_fewer_than_it_claims():
    claims = {"a": 10**9 - 1, "b": 60, "c": 40, "d": 9}
    replies = [guard.Reply(site, None, count, {}) for site, count in claims.items()]
    got = {r.site: (r.images, r.bound) for r in guard.weigh(replies, {"b": 50}, 0.8)}
    assert got == {"a": (4 * 99, "largest-share"), "b": (50, "admitted number"), "c": (40, ""), "d": (9, "")}
    sentence = metrics.bounded("a", 10**9 - 1, 396, "largest-share")
    assert sentence.startswith(
        "a says that it has 999,999,999 images and counts for 396, since one site may weigh no more"
    )
    assert sentence.endswith("bouquet hub admit NAME KEY.pub --images N")


def test_a_metric_is_weighted_by_images():
    # (30·1 + 10·2) / 40 = 1.25
    sites = {"a": history.Part({"train-loss": 1.0}, 30), "b": history.Part({"train-loss": 2.0}, 10)}
    assert history.weighted(sites, "train-loss") == 1.25


@pytest.mark.parametrize(
    ("reason", "why"),
    [
        ("The FAB could not be verified.", "no publisher that it pins has signed this bundle"),
        ("TRUST-06  The bundle's signature is too old.", "its signature is too old"),
        ("TRUST-07  \x1b]0;pwned\x07", "the site has run a newer one of that publisher"),
        ("", "no publisher that it pins has signed this bundle"),
    ],
)
def test_a_site_that_refuses_the_code_says_which_rule_it_broke_in_the_hubs_own_words(reason, why):
    with pytest.raises(HubError) as refused:
        guard.accept(message(Error(7, reason)), SENT, HASH, training=True)
    assert str(refused.value) == f"TRUST-01  The site does not trust this code: {why}."
