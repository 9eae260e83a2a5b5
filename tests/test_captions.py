"""Which words a photo is trained on: lists, caption files, templates and labels, as other programs write them."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from app.errors import SiteError
from app.site import privacy
from app.site.photos.data import scan
from app.site.photos.folders import OURS

ROSE, LILY = "a red rose", "a white lily"


def picture(number: int) -> bytes:
    out = BytesIO()
    Image.new("RGB", (8, 8), (number * 20, 40, 80)).save(out, "JPEG")
    return out.getvalue()


def put(folder: Path, files: dict[str, str | bytes]) -> Path:
    """Files by name; a text as UTF-8, the pictures `0.jpg`, `1.jpg` … of the folders in "pictures" distinct ones."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def two(folder: Path, below: str = "") -> Path:
    """Two pictures, 0.jpg and 1.jpg."""
    return put(folder, {os.path.join(below, f"{number}.jpg"): picture(number) for number in (0, 1)})


def captions(folder: Path) -> dict[str, str]:
    return {photo.name: photo.caption for photo in scan(folder).photos}


def every(folder: Path) -> dict[str, tuple[str, ...]]:
    return {photo.name: photo.captions for photo in scan(folder).photos}


def lines(*rows: dict, end: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


def refused(folder: Path, code: str) -> SiteError:
    with pytest.raises(SiteError, match=code) as caught:
        scan(folder)
    return caught.value


BOTH = {"0.jpg": ROSE, "1.jpg": LILY}
ROWS = [{"file_name": name, "text": text} for name, text in BOTH.items()]
COLUMNS = [f"{name},{text}" for name, text in BOTH.items()]

# --- lists
# -------------------------------------------------------------------------------------------------------------

LISTS = {
    "metadata.jsonl": lines(*ROWS),
    "metadata.jsonl with a byte order mark": lines(*ROWS).encode("utf-8-sig"),
    "metadata.jsonl in UTF-16, as PowerShell writes it": lines(*ROWS, end="\r\n").encode("utf-16"),
    "metadata.jsonl of Windows": lines(*ROWS, end="\r\n"),
    "Metadata.JSONL": lines(*ROWS),
    "captions.jsonl with other columns": lines(
        *({"image": f"./{row['file_name']}", "prompt": row["text"]} for row in ROWS)
    ),
    "metadata.csv": "\n".join(["file_name,text", *COLUMNS]),
    "metadata.csv of Excel": "\r\n".join(["sep", "File_Name;Text", *COLUMNS][1:]).replace(",", ";").encode("utf-8-sig"),
    "captions.csv without a head": "\n".join(COLUMNS),
    "metadata.tsv": "\n".join(["file_name\ttext", *COLUMNS]).replace(",", "\t"),
    "captions.txt with a head": "\n".join(["image,caption", *COLUMNS]),
    "captions.txt with tabs": "\n\n".join(COLUMNS).replace(",", "\t"),
    "captions.txt with bars": "\n".join(COLUMNS).replace(",", "|"),
    "captions.txt with blanks": "\n".join(COLUMNS).replace(",", " "),
    "tokens.txt of Flickr": "\n".join(COLUMNS).replace(".jpg,", ".jpg#0\t"),
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("below", ["", "photos"])
def test_a_list_gives_each_photo_its_caption_and_none_the_templates(tmp_path, name, below):
    two(tmp_path, below)
    put(tmp_path, {os.path.join(below, name.split(" ")[0]): LISTS[name], "caption.txt": "a flower"})
    assert captions(tmp_path) == {os.path.join(below, file): text for file, text in BOTH.items()}
    assert scan(tmp_path).counts == {"images": 2}


NAMES = {
    "decomposed on disk, composed in the list": (unicodedata.normalize("NFD", "é.jpg"), "é.jpg"),
    "composed on disk, decomposed in the list": ("é.jpg", unicodedata.normalize("NFD", "é.jpg")),
    "backslashes": ("sub/é.jpg", "sub\\é.jpg"),
    "backslashes and a dot": ("sub/é.jpg", ".\\sub\\é.jpg"),
    "another case": ("Sub/É.JPG", "sub/é.jpg"),
    "from the root": ("a/b/é.jpg", "a/b/é.jpg"),
    "a blank at its end": ("é.jpg ", "é.jpg "),
    "without its ending": ("sub/é.jpg", "sub/é"),
    "with the ending it had before it was converted": ("sub/é.v2.jpg", "sub/é.v2.TIF"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("table", [False, True])
def test_a_name_is_found_however_another_system_writes_it(tmp_path, name, table):
    on_disk, listed = NAMES[name]
    put(two(tmp_path), {on_disk: picture(9), "caption.txt": "a flower"})
    if table:
        pq.write_table(pa.table({"file_name": [listed], "text": [ROSE]}), tmp_path / "metadata.parquet")
    else:
        put(tmp_path, {"metadata.jsonl": lines({"file_name": listed, "text": ROSE})})
    assert captions(tmp_path)[on_disk] == ROSE and scan(tmp_path).counts == {"images": 3}


def test_two_names_that_differ_in_case_alone_are_not_taken_for_each_other(tmp_path):
    put(two(tmp_path), {"a.jpg": picture(8), "A.jpg": picture(9), "caption.txt": "a flower"})
    put(tmp_path, {"metadata.jsonl": lines({"file_name": "a.jpg", "text": ROSE}, {"file_name": "a.JPG", "text": LILY})})
    assert captions(tmp_path) == {"a.jpg": ROSE, "0.jpg": "a flower", "1.jpg": "a flower", "A.jpg": "a flower"}
    assert scan(tmp_path).counts == {"images": 4, "absent": 1}


def test_two_pictures_that_differ_in_their_endings_alone_are_not_taken_for_each_other(tmp_path):
    put(two(tmp_path), {"a.jpg": picture(8), "a.jpe": picture(9), "caption.txt": "a flower"})
    put(tmp_path, {"metadata.jsonl": lines({"file_name": "a.png", "text": ROSE}, {"file_name": "a", "text": LILY})})
    assert set(captions(tmp_path).values()) == {"a flower"} and scan(tmp_path).counts == {"images": 4, "absent": 2}


def test_an_absolute_name_within_the_folder_is_found_and_one_of_another_computer_is_absent(tmp_path):
    two(tmp_path)
    put(
        tmp_path,
        {
            "caption.txt": "x",
            "a.jsonl": lines(
                {"file_name": str(tmp_path / "0.jpg"), "text": ROSE}, {"file_name": r"C:\1.jpg", "text": LILY}
            ),
        },
    )
    assert captions(tmp_path) == {"0.jpg": ROSE, "1.jpg": "x"}
    assert scan(tmp_path).counts == {"images": 2, "absent": 1}


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c"])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_line_ends_at_a_line_feed_and_nowhere_else(tmp_path, mark, name):
    row = (
        f'{{"file_name": "0.jpg", "text": "red{mark}rose"}}'
        if name.endswith("jsonl")
        else f"file_name,text\n0.jpg,red{mark}rose"
    )
    second = lines(ROWS[1]) if name.endswith("jsonl") else "1.jpg,a white lily\n"
    put(two(tmp_path), {name: f"{row}\n{second}"})
    assert captions(tmp_path) == {"0.jpg": "red rose", "1.jpg": LILY}


def test_a_caption_with_commas_that_nobody_quoted_is_not_cut(tmp_path):
    put(two(tmp_path), {"metadata.csv": 'file_name,text\n0.jpg,a rose, red, wet\n1.jpg,"a lily, white\nand large"\n'})
    assert captions(tmp_path) == {"0.jpg": "a rose, red, wet", "1.jpg": "a lily, white and large"}


def test_a_row_with_too_many_fields_is_named_where_the_caption_is_not_the_last_column(tmp_path):
    put(two(tmp_path), {"metadata.csv": "file_name,text,source\n0.jpg,a rose, red,me\n"})
    assert "row 2: 4 fields, and its head has 3" in refused(tmp_path, "SITE-06").found


def test_half_an_emoji_loses_neither_the_site_nor_the_caption(tmp_path):
    put(two(tmp_path), {"metadata.jsonl": lines(ROWS[1]) + '{"file_name": "0.jpg", "text": "so pretty \\ud83c"}\n'})
    assert captions(tmp_path) == {"1.jpg": LILY, "0.jpg": "so pretty ?"}


def test_a_number_is_a_caption_and_a_list_and_further_lines_of_it_are_several(tmp_path):
    rows = [
        {"file_name": "0.jpg", "text": 2023},
        {"file_name": "1.jpg", "text": ["", LILY, "a  lily", None, LILY, ["deeper"]]},
        {"file_name": "1.jpg", "text": "third"},
        {"file_name": "1.jpg", "text": "a lily"},
    ]
    put(two(tmp_path), {"metadata.jsonl": lines(*rows)})
    assert captions(tmp_path) == {"0.jpg": "2023", "1.jpg": LILY}
    assert every(tmp_path) == {"0.jpg": ("2023",), "1.jpg": (LILY, "a lily", "third")}
    assert scan(tmp_path).counts == {"images": 2}


def test_five_lines_a_photo_as_flickrs_lists_have_them_are_five_captions(tmp_path):
    said = [f"{number}.jpg#{nth}\tcaption {number} {nth}\n" for number in (0, 1) for nth in range(5)]
    put(two(tmp_path), {"captions.token.txt": "".join(said)})
    assert every(tmp_path) == {f"{n}.jpg": tuple(f"caption {n} {nth}" for nth in range(5)) for n in (0, 1)}
    assert scan(tmp_path).counts == {"images": 2}


def test_a_photo_has_at_most_sixteen_captions_and_that_it_had_more_is_counted(tmp_path):
    rows = [{"file_name": "0.jpg", "text": [f"c{n}" for n in range(16)]}, *({"file_name": "1.jpg", "text": f"c{n}"}
            for n in range(50))]  # fmt: skip
    put(two(tmp_path), {"metadata.jsonl": lines(*rows)})
    assert set(every(tmp_path).values()) == {tuple(f"c{n}" for n in range(16))}
    assert scan(tmp_path).quarantined == (("1.jpg", "unused-caption"),)


def test_the_lines_of_the_nearer_list_alone_are_a_photos_captions(tmp_path):
    two(tmp_path, "a")
    put(tmp_path, {"metadata.jsonl": lines({"file_name": "a/0.jpg", "text": ["far", "further"]})})
    put(tmp_path, {"a/metadata.jsonl": lines(*ROWS, {"file_name": "0.jpg", "text": "a rose"})})
    assert every(tmp_path) == {"a/0.jpg": (ROSE, "a rose"), "a/1.jpg": (LILY,)}


def test_a_photo_of_several_captions_is_public_only_with_all_of_them(tmp_path):
    put(two(tmp_path), {"metadata.jsonl": lines({"file_name": "0.jpg", "text": [ROSE, "a rose"]}, ROWS[1])})
    privacy.declare_public(tmp_path, scan(tmp_path).photos)
    assert privacy.is_public(tmp_path, scan(tmp_path).photos)
    put(tmp_path, {"metadata.jsonl": lines({"file_name": "0.jpg", "text": [ROSE, "mine"]}, ROWS[1])})
    assert not privacy.is_public(tmp_path, scan(tmp_path).photos)


def test_of_two_lists_the_one_nearer_to_the_photo_counts(tmp_path):
    two(tmp_path, "a/b")
    put(tmp_path, {"metadata.jsonl": lines(*({"file_name": f"a/b/{n}.jpg", "text": "root"} for n in (0, 1)))})
    put(
        tmp_path,
        {"a/b/metadata.jsonl": lines(*ROWS), "a/metadata.jsonl": lines({"file_name": "b/0.jpg", "text": "middle"})},
    )
    assert captions(tmp_path) == {"a/b/0.jpg": ROSE, "a/b/1.jpg": LILY}
    assert scan(tmp_path).counts == {"images": 2, "unused-caption": 3}


def test_a_listed_class_makes_the_caption_and_a_listed_photo_without_any_words_has_none(tmp_path):
    rows = [
        {"file_name": "0.jpg", "label": "moon_orchid"},
        {"file_name": "1.jpg", "label": "rose"},
        {"file_name": "2.jpg", "text": ""},
    ]
    put(two(tmp_path), {"metadata.jsonl": lines(*rows), "2.jpg": picture(2)})
    assert captions(tmp_path) == {"0.jpg": "a photo of a moon orchid", "1.jpg": "a photo of a rose"}
    put(tmp_path, {"caption.txt": "{label}, in a garden"})
    assert captions(tmp_path) == {"0.jpg": "moon orchid, in a garden", "1.jpg": "rose, in a garden"}
    put(tmp_path, {"caption.txt": "a garden"})
    assert "2.jpg" not in captions(tmp_path) and scan(tmp_path).counts == {"images": 2, "no-caption": 1}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_list_in_another_encoding_is_named_with_its_line(tmp_path, name):
    text = (
        lines(*ROWS, {"file_name": "0.jpg", "text": "pensée"})
        if name.endswith("jsonl")
        else "file_name,text\n0.jpg,a\n1.jpg,pensée\n"
    )
    put(two(tmp_path), {name: text.encode("latin-1")})
    assert "line 3 is no UTF-8" in refused(tmp_path, "SITE-06").found


@pytest.mark.parametrize("text", ["[]", '{"a": 1}', "3"])
def test_a_metadata_jsonl_that_is_no_list_is_refused_and_another_jsonl_counted(tmp_path, text):
    put(two(tmp_path), {"other.jsonl": text, "caption.txt": "a flower"})
    assert scan(tmp_path).counts == {"images": 2, "not-a-picture": 1}
    put(tmp_path, {"metadata.jsonl": text})
    refused(tmp_path, "SITE-06")


OTHERS = {
    "README.txt": "These photos, taken in May, are mine.",
    "names.txt": "0.jpg\n1.jpg\n",
    "prices.csv": "article,price\nrose,3\n",
    "nothing.csv": "",
    "names.csv": "file_name,width\n0.jpg,8\n",
    "log.jsonl": '{"time": 3}\n',
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_text_that_is_no_list_of_captions_is_counted_and_ends_nothing(tmp_path, name):
    put(two(tmp_path), {name: OTHERS[name], "caption.txt": "a flower"})
    assert captions(tmp_path) == dict.fromkeys(BOTH, "a flower")
    assert scan(tmp_path).quarantined == ((name, "not-a-picture"),)


def test_a_text_in_another_encoding_that_may_have_been_a_list_is_counted_as_that(tmp_path):
    put(two(tmp_path), {"list.csv": "0.jpg,pensée\n".encode("latin-1"), "caption.txt": "a flower"})
    assert scan(tmp_path).quarantined == (("list.csv", "caption-unreadable"),)


# --- lists without known columns, and what is none ------------------------------------------------------------------

BESIDE = {
    "sizes.csv": "name,width,height\n0.jpg,640,480\n1.jpg,640,480\n",
    "positions.csv": "id,lat,lon\n0,52.3,13.4\n1,52.4,13.5\n",
    "README.txt": "Photos of the garden, taken in May.\n\n0.jpg  the only one with a flash; retouch before use\n",
    "classes.txt": "0 poppy\n1 lily\n",
    "table.txt": "name width height\n0.jpg 640 480\n1.jpg 640 480\n",
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("files", [True, False])
def test_a_file_that_says_other_things_of_photos_is_no_list(tmp_path, name, files):
    """With caption files a text is one without a photo, and without them not a picture; a .csv always is the latter."""
    beside = {"0.txt": ROSE, "1.txt": LILY} if files else {"caption.txt": "a flower"}
    put(two(tmp_path), {name: BESIDE[name], **beside})
    assert captions(tmp_path) == (BOTH if files else dict.fromkeys(BOTH, "a flower"))
    reason = "unused-caption" if files and name.endswith(".txt") else "not-a-picture"
    assert scan(tmp_path).quarantined == ((name, reason),)


def test_caption_files_come_before_a_list_without_known_columns(tmp_path):
    """Its two lines name 0.jpg and 2.jpg: the first has a file of its own, the second has none; 1.jpg isn't named."""
    put(two(tmp_path), {"2.jpg": picture(2), "checksums.txt": "0.jpg d41d8\n2.jpg aaaa\n"})
    put(tmp_path, {"0.txt": ROSE, "1.txt": LILY})
    assert captions(tmp_path) == {**BOTH, "2.jpg": "aaaa"}
    assert scan(tmp_path).quarantined == (("0.jpg", "unused-caption"),)


def test_a_list_with_known_columns_comes_before_a_nearer_one_without(tmp_path):
    two(tmp_path, "a")
    put(tmp_path, {"a/list.csv": "0.jpg,near\n1.jpg,near\n", "b.csv": "file_name,text\na/0.jpg,far\n"})
    assert captions(tmp_path) == {"a/0.jpg": "far", "a/1.jpg": "near"}
    assert scan(tmp_path).quarantined == (("a/0.jpg", "unused-caption"),)


def test_a_folder_may_be_a_part_of_the_data_set_whose_list_it_has(tmp_path):
    """Of two hundred names, Flickr's captions numbered, the last two are there."""
    put(two(tmp_path), {"list.tsv": "".join(f"{number}.jpg#0\tpicture {number}\n" for number in range(199, -1, -1))})
    assert captions(tmp_path) == {"0.jpg": "picture 0", "1.jpg": "picture 1"}


@pytest.mark.parametrize(("named", "counts"), [(2, False), (3, True)])
def test_most_of_the_first_lines_of_a_list_without_columns_name_photos(tmp_path, named, counts):
    """Of four lines that say something two are half of them, and three are most."""
    put(two(tmp_path), {"2.jpg": picture(2), "caption.txt": "a flower"})
    text = "".join(f"{number}.jpg\t{ROSE}\n\n" for number in range(named)) + "the rest\tof it\n" * (4 - named)
    put(tmp_path, {"list.tsv": text})
    assert captions(tmp_path) == dict.fromkeys(["0.jpg", "1.jpg", "2.jpg"], ROSE if counts else "a flower")
    assert scan(tmp_path).quarantined == ((("the rest", "absent"),) if counts else (("list.tsv", "not-a-picture"),))


QUOTED = {
    "captions.csv": '"0.jpg","a red poppy, meadow"\n"1.jpg","a ""white"" lily"\n',
    "captions.csv with half a head": 'image_name,caption\n0.jpg,"a red poppy, meadow"\n1.jpg,"a ""white"" lily"\n',
    "captions.tsv": '"0.jpg"\t"a red poppy, meadow"\n1.jpg\t"a ""white"" lily"\n',
    "lines.csv": '0.jpg,"a red poppy,\nmeadow"\n1.jpg,"a ""white"" lily"\n2.jpg,absent\n3.jpg,here\n4.jpg,here\n',
    "token.tsv": '0.jpg#0\ta red poppy, meadow\n1.jpg#0\ta "white" lily\n',
}


@pytest.mark.parametrize("name", QUOTED)
def test_the_quotes_of_a_list_without_known_columns_go(tmp_path, name):
    extra = {"3.jpg": picture(3), "4.jpg": picture(4)} if name == "lines.csv" else {}
    put(two(tmp_path), {name.split(" ")[0]: QUOTED[name], **extra})
    assert captions(tmp_path) == {
        "0.jpg": "a red poppy, meadow",
        "1.jpg": 'a "white" lily',
        **dict.fromkeys(extra, "here"),
    }


def test_a_quote_that_nobody_closed_is_a_letter_where_tabs_part_names_from_captions(tmp_path):
    """As Flickr's own lists have them, which nobody quoted."""
    put(two(tmp_path), {"captions.token.txt": '0.jpg#0\t" A man\n0.jpg#1\t"Rosa" in a garden\n1.jpg#0\ta lily\n'})
    assert every(tmp_path) == {"0.jpg": ('" A man', '"Rosa" in a garden'), "1.jpg": ("a lily",)}


@pytest.mark.parametrize("separator", ["|", ","])
def test_flickr30ks_table_gives_each_photo_its_comments_without_their_numbers(tmp_path, separator):
    rows = ["image_name| comment_number| comment", "0.jpg| 0| Two young guys .", "0.jpg| 1| Two men .",
            "1.jpg| 0| A dog, running ."]  # fmt: skip
    put(two(tmp_path), {"results.csv": "\n".join(rows).replace("|", separator)})
    assert every(tmp_path) == {"0.jpg": ("Two young guys .", "Two men ."), "1.jpg": ("A dog, running .",)}
    assert scan(tmp_path).counts == {"images": 2}


# --- damaged rows -----------------------------------------------------------------------------------------------------

OPEN = {
    "to the end": ('0.jpg,"a red poppy\n1.jpg,a lily\n2.jpg,a lotus\n', "row 2: its quotes hold the row of 1.jpg too"),
    "to the next quote": (
        '0.jpg,"a red poppy\n1.jpg,a lily\n2.jpg,a lotus\n3.jpg,"a thistle, sand"\n4.jpg,a rose\n',
        "row 2: its quotes hold the row of 1.jpg too",
    ),
    "to a quote that ends a line": ('0.jpg,a rose\n1.jpg,"a lily\n0.jpg,a "lotus""\n', "row 3: "),
    "over a photo that is there": ('1.jpg,"a lily\n0.jpg,a rose"\n', "row 2: its quotes hold the row of 0.jpg too"),
    "over one that is not": ('1.jpg,a lily\n0.jpg,"a rose\n7.jpg,gone"\n', "row 3: its quotes hold the row of 7.jpg"),
}


@pytest.mark.parametrize("how", OPEN)
@pytest.mark.parametrize(("name", "separator"), [("metadata.csv", ","), ("list.tsv", "\t")])
def test_a_quote_that_takes_in_the_rows_after_it_is_refused_by_its_row(tmp_path, how, name, separator):
    """The head is line 1; a list by its columns is refused as metadata.csv is, even where no row before is good."""
    rows, said = OPEN[how]
    put(two(tmp_path), {"caption.txt": "a flower", name: f"file_name,text\n{rows}".replace(",", separator)})
    assert f"{name}: {said}".replace(",", separator) in refused(tmp_path, "SITE-06").found.replace(",", separator)


def test_a_quote_takes_in_rows_wherever_the_column_of_names_is_and_without_their_endings(tmp_path):
    put(two(tmp_path), {"metadata.csv": 'text,file_name\na rose,0.jpg\n"a lily,1.jpg\na lotus,0.jpg"\n'})
    assert "row 3: its quotes hold the row of 0.jpg" in refused(tmp_path, "SITE-06").found
    put(tmp_path, {"metadata.csv": 'file_name,text\n0,"a rose\n1,a lily"\n'})
    assert "row 2: its quotes hold the row of 1 too" in refused(tmp_path, "SITE-06").found


def test_a_quoted_caption_may_go_on_over_lines_that_name_no_other_photo(tmp_path):
    said = '0.jpg,"a rose,\n\nred, wet\n0.jpg, again\nsee also 1.jpg, below"\n1.jpg,"a lily\nrose, white"\n'
    put(two(tmp_path), {"rose.jpg": picture(2), "rose.txt": "x", "metadata.csv": f"file_name,text\n{said}"})
    want = "a rose, red, wet 0.jpg, again see also 1.jpg, below"
    assert captions(tmp_path) == {"0.jpg": want, "1.jpg": "a lily rose, white", "rose.jpg": "x"}


# --- names that may be of other files ---------------------------------------------------------------------------------

CLOSER = {
    "another ending": ("IMG_1.jpg", "IMG_1.png"),
    "no ending": ("IMG_1", "IMG_1.png"),
    "another case": ("img_1.png", "IMG_1.png"),
    "another ending, and another case": ("IMG_1.jpg", "img_1.PNG"),
}


@pytest.mark.parametrize("how", CLOSER)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("table", [False, True])
def test_a_photo_takes_no_caption_of_another_that_the_same_list_names_too(tmp_path, how, turned, table):
    """IMG_1.png alone is there: the closer of two names is its own, and the other's photo is absent."""
    loose, close = CLOSER[how]
    rows = [{"file_name": loose, "text": "a lily in a vase"}, {"file_name": close, "text": "a screenshot of a chart"}]
    rows = rows[::-1] if turned else rows
    put(two(tmp_path), {"IMG_1.png": picture(5), "caption.txt": "a flower"})
    if table:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    else:
        put(tmp_path, {"metadata.jsonl": lines(*rows)})
    assert every(tmp_path)["IMG_1.png"] == ("a screenshot of a chart",)
    assert scan(tmp_path).quarantined == ((loose, "absent"),)


def test_another_lists_closer_name_leaves_this_lists_loose_one(tmp_path):
    """Both name 0.jpg; the nearer list counts, as ever, and the one further off is counted."""
    two(tmp_path, "a")
    put(tmp_path, {"metadata.jsonl": lines({"file_name": "a/0.jpg", "text": "far"})})
    put(tmp_path, {"a/metadata.jsonl": lines({"file_name": "0.png", "text": ROSE}, ROWS[1])})
    assert captions(tmp_path) == {"a/0.jpg": ROSE, "a/1.jpg": LILY}
    assert scan(tmp_path).quarantined == (("a/0.jpg", "unused-caption"),)


# --- caption files
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".txt", ".caption", ".TXT", ".jpg.txt"])
def test_a_caption_file_counts_before_the_template(tmp_path, suffix):
    put(two(tmp_path, "10_zwx flower"), {f"10_zwx flower/0{suffix}": ROSE, "caption.txt": "a photo of a {label}"})
    assert captions(tmp_path) == {"10_zwx flower/0.jpg": ROSE, "10_zwx flower/1.jpg": "a photo of a zwx flower"}
    assert scan(tmp_path).counts == {"images": 2}


def test_list_before_caption_file_before_template(tmp_path):
    put(two(tmp_path), {"2.jpg": picture(2), "caption.txt": "template"})
    put(tmp_path, {"0.txt": "file", "1.txt": "file", "metadata.jsonl": lines({"file_name": "0.jpg", "text": "list"})})
    assert captions(tmp_path) == {"0.jpg": "list", "1.jpg": "file", "2.jpg": "template"}
    assert scan(tmp_path).quarantined == (("0.txt", "unused-caption"),)


def test_a_list_that_says_nothing_of_a_photo_leaves_it_its_caption_file(tmp_path):
    put(two(tmp_path), {"0.txt": "file", "1.txt": "file", "metadata.jsonl": lines({"file_name": "0.jpg"})})
    assert captions(tmp_path) == {"0.jpg": "file", "1.jpg": "file"}


def test_the_first_line_that_says_something_is_the_caption_and_further_ones_are_counted(tmp_path):
    put(two(tmp_path), {"0.txt": "\ufeff\n a red  rose \r\nflower, red\n", "1.txt": LILY, "1.caption": "another"})
    assert captions(tmp_path) == BOTH
    assert scan(tmp_path).quarantined == (("0.txt", "unused-caption"), ("1.caption", "unused-caption"))


def test_a_caption_file_without_words_or_without_readable_words_sets_its_photo_aside(tmp_path):
    put(two(tmp_path), {f"{number}.jpg": picture(number) for number in (2, 3, 4)} | {"caption.txt": "a flower"})
    put(tmp_path, {"2.txt": " \n", "3.txt": "pensée".encode("latin-1")})
    (tmp_path / "4.txt").symlink_to("/etc/hostname")
    assert captions(tmp_path) == dict.fromkeys(BOTH, "a flower")
    assert scan(tmp_path).quarantined == (
        ("2.jpg", "no-caption"),
        ("3.jpg", "caption-unreadable"),
        ("4.jpg", "caption-unreadable"),
    )


def test_caption_files_of_absent_photos_are_counted(tmp_path):
    put(two(tmp_path), {"0.txt": ROSE, "1.txt": LILY, "2.txt": "gone", "3.caption": "gone"})
    assert scan(tmp_path).quarantined == (("2.txt", "unused-caption"), ("3.caption", "unused-caption"))


def test_two_pictures_of_one_name_share_a_caption_file(tmp_path):
    png = BytesIO()
    Image.new("RGB", (8, 8), "red").save(png, "PNG")
    put(tmp_path, {"0.jpg": picture(0), "0.png": png.getvalue(), "0.txt": ROSE})
    assert captions(tmp_path) == {"0.jpg": ROSE, "0.png": ROSE} and scan(tmp_path).counts == {"images": 2}


def test_a_caption_file_is_found_by_a_name_in_other_letters(tmp_path):
    put(
        tmp_path, {"É.jpg": picture(0), "0.jpg": picture(1), unicodedata.normalize("NFD", "é.txt"): ROSE, "0.txt": LILY}
    )
    assert captions(tmp_path) == {"É.jpg": ROSE, "0.jpg": LILY}


# --- templates and labels
# -------------------------------------------------------------------------------------------------


def test_of_several_templates_the_nearest_one_up_counts(tmp_path):
    put(
        tmp_path,
        {f"{folder}/1.jpg": picture(number) for number, folder in enumerate(("rose", "rose/may", "lily", "other"))},
    )
    put(tmp_path, {"caption.txt": "a {label}", "rose/caption.txt": ROSE, "lily/Caption.txt": LILY.encode("utf-8-sig")})
    assert captions(tmp_path) == {
        "lily/1.jpg": LILY,
        "other/1.jpg": "a other",
        "rose/1.jpg": ROSE,
        "rose/may/1.jpg": ROSE,
    }
    assert {photo.caption for photo in scan(tmp_path, caption_template="x").photos} == {"x"}


@pytest.mark.parametrize("text", ["0.jpg a red rose\n1.jpg a white lily\n", "a flower\nanother\n"])
@pytest.mark.parametrize("name", ["caption.txt", "sub/caption.txt"])
def test_a_template_of_several_lines_is_refused_and_not_joined(tmp_path, text, name):
    put(two(tmp_path), {name: text})
    error = refused(tmp_path, "SITE-05")
    assert str(tmp_path / name) in error.found and "2 lines" in error.found


@pytest.mark.parametrize(("name", "code"), [("caption.txt", "SITE-05"), ("metadata.jsonl", "SITE-06")])
def test_a_link_that_leads_out_says_so_and_how_the_folder_is_copied(tmp_path, name, code):
    """As Hugging Face's cache has it: every file of a snapshot is a link to ../../blobs."""
    put(tmp_path, {"blobs/a": "a flower"})
    put(two(tmp_path / "snapshot"), {})
    (tmp_path / "snapshot" / name).symlink_to("../blobs/a")
    error = refused(tmp_path / "snapshot", code)
    assert f"{name}: a link or path that leads out of the data folder; copy" in error.found and "cp -rL" in error.found


LABELS = {
    "rose/train/1.jpg": "rose", "train/rose/1.jpg": "rose", "data/Images/moon_orchid/1.jpg": "moon orchid",
    "12_rose/1.jpg": "rose", "2024/1.jpg": "2024", "rose/DCIM/100CANON/1.jpg": "rose", "dcim/101_FUJI/1.jpg": None,
    "100 roses/1.jpg": "100 roses", "train/1.jpg": None, "1.jpg": None,
}  # fmt: skip


@pytest.mark.parametrize("name", LABELS)
def test_the_label_is_the_nearest_folder_that_is_no_split(tmp_path, name):
    put(tmp_path, {"lily/1.jpg": picture(1), "lily/2.jpg": picture(2), name: picture(3), "caption.txt": "a {label}"})
    assert captions(tmp_path).get(name) == (LABELS[name] and f"a {LABELS[name]}")
    assert scan(tmp_path).counts == ({"images": 3} if LABELS[name] else {"images": 2, "no-caption": 1})


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_beside_photos_that_is_none_of_pictures_is_counted_and_says_its_columns(tmp_path):
    put(two(tmp_path), {"metadata.jsonl": lines(*ROWS)})
    pq.write_table(pa.table({"url": ["http://x/0.jpg"], "caption": ["c"]}), tmp_path / "00000.parquet")
    pq.write_table(pa.table({"image": [[[1, 2]]], "text": ["c"]}), tmp_path / "arrays.parquet")
    assert captions(tmp_path) == BOTH
    assert scan(tmp_path).quarantined == (
        ("00000.parquet (no image column among url, caption)", "not-a-picture"),
        ("arrays.parquet (its column image holds list<element: list<element: int64>>, no pictures)", "not-a-picture"),
    )


def test_of_several_image_columns_none_is_guessed_and_one_that_is_called_image_counts(tmp_path):
    features = {name: {"_type": "Image"} for name in ("before", "after")}
    notes = {"huggingface": json.dumps({"info": {"features": features}})}
    pictures = [{"bytes": picture(number), "path": None} for number in (1, 2)]
    table = pa.table({"before": pictures, "after": pictures[::-1], "text": ["a", "b"]})
    pq.write_table(table.replace_schema_metadata(notes), tmp_path / "t.parquet")
    error = refused(tmp_path, "SITE-01")
    assert "t.parquet (2 image columns, before and after: nobody knows which; call one image)" in error.found
    pq.write_table(table.rename_columns(["before", "image", "text"]), tmp_path / "t.parquet")
    assert [photo.load() for photo in scan(tmp_path).photos] == [picture(2), picture(1)]


def test_a_tables_text_is_a_path_from_its_own_folder_or_the_root_and_an_address_is_never_fetched(tmp_path):
    two(tmp_path, "data")
    paths = ["0.jpg", "data/1.jpg", "https://example.org/2.jpg", "gone.jpg", "../out.jpg"]
    pq.write_table(pa.table({"image": paths, "caption": ["a", "b", "c", "d", "e"]}), tmp_path / "data" / "t.parquet")
    assert captions(tmp_path) == {"data/0.jpg": "a", "data/1.jpg": "b"}
    assert scan(tmp_path).counts == {"images": 2, "absent": 2, "address": 1}


def test_a_path_out_of_the_folder_is_outside(tmp_path):
    two(tmp_path / "site")
    put(tmp_path, {"out.jpg": picture(7), "site/caption.txt": "x"})
    pq.write_table(pa.table({"image": ["../out.jpg"], "caption": ["e"]}), tmp_path / "site" / "t.parquet")
    assert scan(tmp_path / "site").counts == {"images": 2, "outside": 1}


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_tables_list_is_several_captions_and_a_row_without_is_not_given_the_template(tmp_path, kind):
    pictures = [{"bytes": picture(number), "path": None} for number in range(4)]
    table = pa.table({"image": pictures, "text": [["one", "two"], ["three"], [], None]})
    if kind == "parquet":
        pq.write_table(table, tmp_path / "t.parquet")
    else:
        with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
            out.write_table(table)
    put(tmp_path, {"caption.txt": "a flower"})
    assert sorted(every(tmp_path).values()) == [("one", "two"), ("three",)]
    assert scan(tmp_path).counts == {"images": 2, "no-caption": 2}


def test_a_pointer_in_place_of_a_file_is_called_one(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    put(two(tmp_path), {"2.jpg": pointer, "caption.txt": "a flower"})
    assert scan(tmp_path).quarantined == (("2.jpg", "pointer"),)
    put(tmp_path, {"train.parquet": pointer})
    assert "git lfs pull" in refused(tmp_path, "SITE-07").found


# --- everything else --------------------------------------------------------------------------------------------------

SYSTEM = (
    "@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg", "#recycle/a.jpg", "$RECYCLE.BIN/a.jpg", "__MACOSX/a.jpg", ".Trash-1000/a.jpg",
    "lost+found/a.jpg", "System Volume Information/a.jpg", ".thumbnails/a.jpg", "@Recycle/a.jpg", "._0.jpg",
    "Thumbs.db", "desktop.ini", ".DS_Store", "Icon\r", "0.jpg~", "2.jpg.part", "2.jpg.crdownload", "~$notes.docx",
    "0.sync-conflict-20260101-120000-ABCDEFG.jpg", "0 (Anna's conflicted copy 2026-01-01).jpg", "sub/#snapshot/a.jpg",
    "cache-12.arrow",
)  # fmt: skip


@pytest.mark.parametrize("name", SYSTEM)
def test_what_a_computer_keeps_for_itself_is_counted_and_not_trained_on(tmp_path, name):
    put(two(tmp_path), {name: picture(9), "caption.txt": "a flower"})
    assert scan(tmp_path).counts == {"images": 2, "system": 1}


@pytest.mark.parametrize(
    "name", ["a.jfif", "a.JPE", "a.jpeg_large", "a", "a.jpg?w=800", "a.mpo", "a.PNG", "a.dng", "a b.c.d"]
)
def test_what_is_a_picture_its_content_says(tmp_path, name):
    put(two(tmp_path), {name: picture(9), "caption.txt": "a flower"})
    assert name in captions(tmp_path) and scan(tmp_path).counts == {"images": 3}


def test_every_other_file_is_counted_once_by_what_it_is(tmp_path):
    gif, tiff = BytesIO(), BytesIO()
    Image.new("RGB", (8, 8)).save(gif, "GIF"), Image.new("RGB", (8, 8)).save(tiff, "TIFF")
    put(
        two(tmp_path),
        {
            "caption.txt": "a flower",
            "photos.zip": b"PK\3\4",
            "0.xmp": "<x>",
            "0.json": "{}",
            "video.mp4": b"\0\0\0\x18ftypisom",
        },
    )
    put(
        tmp_path,
        {
            "scan": gif.getvalue(),
            "IMG.NEF": tiff.getvalue(),
            "a.heic": b"\0\0\0\x18ftypheic",
            "empty": b"",
            "LICENSE": "mine",
        },
    )
    assert scan(tmp_path).counts == {"images": 2, "format": 3, "not-a-picture": 6}
    assert len(scan(tmp_path).quarantined) + 3 == len(list(tmp_path.iterdir()))


def test_what_this_project_writes_into_a_folder_is_no_file_of_the_sites(tmp_path):
    assert privacy.PUBLIC_LIST in OURS
    put(two(tmp_path), {"caption.txt": "a flower", **dict.fromkeys(OURS, "{}")})
    assert scan(tmp_path).counts == {"images": 2}


def test_the_sites_log_names_what_is_about_photos_first(tmp_path):
    put(two(tmp_path), {"caption.txt": "a flower", "z.jpg": b"", **{f"{number}.json": "{}" for number in range(30)}})
    assert scan(tmp_path).report().splitlines()[1] == "  set aside  z.jpg: zero bytes"


def test_nothing_in_a_folder_is_lost(tmp_path):
    """Used or counted: with each file taken away, something that is said changes."""
    put(
        two(tmp_path, "rose"),
        {
            "rose/0.txt": ROSE,
            "rose/1.caption": LILY,
            "caption.txt": "x",
            "2.jpg": picture(2),
            "notes.pdf": b"%PDF",
            "._x": b"",
        },
    )
    put(
        tmp_path,
        {
            "sub/3.jpg": picture(3),
            "sub/metadata.csv": "file_name,text\n3.jpg,three\n",
            "sub/caption.txt": "y",
            "sub/4.jpg": picture(4),
        },
    )
    pq.write_table(pa.table({"image": [picture(5)], "text": ["five"]}), tmp_path / "t.parquet")
    said = lambda: (captions(tmp_path), scan(tmp_path).quarantined)  # noqa: E731
    whole, files = said(), [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 13
    for path in files:
        moved = shutil.move(path, tmp_path.with_name("moved"))
        assert said() != whole, path
        shutil.move(moved, path)
