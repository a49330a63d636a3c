from __future__ import annotations

import base64
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from jgia.observation import Status
from jgia.report import images as report_images
from jgia.report import markup, pairs, render_html, words

VOID = {"meta", "img", "br", "hr"}


class Page(html.parser.HTMLParser):
    """Fails on unbalanced tags; collects elements and text."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.css = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.css += data
        else:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def pixels(address: str) -> np.ndarray:
    prefix = "data:image/png;base64,"
    assert address.startswith(prefix)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address[len(prefix) :]))))


def render(case, **changes):
    return render_html(
        {**case.result, **changes}, case.originals, case.aligned, statuses=None, labels=None
    )


def untruthed(case):
    return {**case.result, "scores": None}


def test_page_is_balanced_and_loads_nothing(case):
    page = Page(render(case))
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "iframe", "object"})
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "action"):
                assert value.startswith("data:image/png;base64,")
    assert "url(" not in page.css
    assert "@import" not in page.css
    assert not re.search(r"https?:", render(case))
    policy = [a["content"] for a in page.all("meta") if a.get("http-equiv")]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_parser_rejects_unbalanced_pages(case):
    with pytest.raises(AssertionError):
        Page(render(case).replace("</section>", "", 1))


def test_images_decode_to_the_pixels_that_were_given(case):
    shown = [pixels(attributes["src"]) for attributes in Page(render(case)).all("img")]
    expected = []
    for original, image in zip(case.originals, case.aligned, strict=True):
        expected.append(np.rint(original * 255).astype(np.uint8))
        if image is not None:
            expected.append(np.rint(image * 255).astype(np.uint8))
    assert len(shown) == len(expected)
    for got, want in zip(shown, expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_grey_images_are_grey(make_case):
    case = make_case(shape=(9, 7, 1))
    first = pixels(Page(render(case)).all("img")[0]["src"])
    np.testing.assert_array_equal(first, np.rint(case.originals[0, :, :, 0] * 255))


def test_accessible_names(case):
    page = Page(render(case))
    assert [a["alt"] for a in page.all("img")[:2]] == [
        "Original image 1",
        "Reconstruction of image 1, PSNR identical",
    ]
    assert [a["aria-label"] for a in page.all("div") if a.get("role") == "img"] == [
        "No reconstruction of image 4"
    ]
    assert len(page.all("caption")) == len(page.all("table")) > 4
    assert all(a.get("scope") in ("row", "col") for a in page.all("th"))
    names = [a["id"] for _, a in page.elements if "id" in a]
    assert len(names) == len(set(names))
    assert {a["aria-labelledby"] for a in page.all("section")} <= set(names)


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", '"><img src=x onerror=a()>', "a&b'"])
def test_strings_are_text_wherever_they_stand(case, evil):
    result = {**case.result, "command": evil, "config": {evil: {evil: evil}}}
    result["data"] = {**result["data"], "name": evil, "provenance": evil}
    result["environment"] = {**result["environment"], "device": evil}
    result["threat_model"] = {**result["threat_model"], "public_data": evil}
    candidates = [{"status": evil}]
    result["attack"] = {
        **result["attack"],
        "name": evil,
        "selected_by": evil,
        "candidates": candidates,
        "num_candidates": 1,
        "status_counts": {evil: 1},
        "stats": {evil: evil},
    }
    result["scores"] = {
        **result["scores"],
        "baselines": {evil: {"median": 1.0, "mean_capped": 1.0}},
    }
    result["timings"] = {**result["timings"], evil: 1.0}
    plain, labels = Page(render(case)), [evil] * 4
    page = Page(render_html(result, case.originals, case.aligned, labels=labels, statuses=labels))
    assert page.text.count(evil) > 20
    assert len(page.all("img")) == len(plain.all("img"))
    assert not page.all("script")
    assert all("onerror" not in attributes for _, attributes in page.elements)


def test_unescaped_markup_would_be_seen():
    assert Page(markup.page(title="t", css="", body=markup.Html("<script>x</script>"))).all(
        "script"
    )


@pytest.mark.parametrize(
    ("num_true", "unmatched", "sentence"),
    [
        (4, 1, "1 of 4 images recovered at ≥ 40 dB: what a malicious server sees"),
        (1, 0, "The image was recovered at ≥ 40 dB: what a malicious server sees"),
        (1, 1, "The image was not recovered at ≥ 40 dB by a malicious server"),
        (3, 3, "None of 3 images was recovered at ≥ 40 dB by a malicious server"),
    ],
)
def test_verdict(make_case, num_true, unmatched, sentence):
    case = make_case(num_true, unmatched=unmatched)
    page = Page(render(case))
    assert sentence in page.text.replace("\u00a0", " ")


def test_verdict_counts_at_the_threshold(case):
    psnr = case.result["scores"]["psnr"]["per_image"]
    for value, count in ((39.99, 1), (40.0, 2)):
        psnr[1] = value
        assert words.num_reaching(case.result, 40) == count
    psnr[:] = [60.0] * 4
    assert words.verdict(case.result).startswith("All 4 images")


def test_without_truth_images_are_shown_unscored(case):
    page = Page(
        render_html(untruthed(case), None, list(case.reconstructions), statuses=case.statuses)
    )
    assert "3 images reconstructed from this update" in page.text
    assert "No true images were given" in page.text
    assert "PSNR" not in page.text
    assert len(page.all("img")) == 3
    nothing = {**untruthed(case)["attack"], "candidates": [], "num_candidates": 0}
    nothing["status_counts"] = {}
    empty = Page(render_html({**untruthed(case), "attack": nothing}, None, []))
    assert "No image reconstructed from this update" in empty.text


def test_honest_but_curious_reads_differently(case):
    threat = {
        **case.result["threat_model"],
        "server": "honest_but_curious",
        "protocol": "fedavg",
        "local_steps": 3,
        "local_learning_rate": 0.05,
        "num_examples": 12,
        "labels_known": True,
    }
    curious = Page(render(case, threat_model=threat)).text
    assert "what an honest-but-curious server sees" in curious
    assert "3 local steps" in curious
    assert "batch size is known (12); labels are known" in curious
    assert "learning rate is known (0.05)" in curious
    malicious = Page(render(case)).text
    assert "Not an honest-but-curious result" in malicious
    assert "Not an honest-but-curious result" not in curious
    assert "Only parameter values" in malicious


def test_sums_and_hidden_layers_are_said(case):
    threat = {**case.result["threat_model"], "num_clients": 8, "visible_layers": ["fc", "head"]}
    page = Page(render(case, threat_model=threat)).text
    assert "Summed over 8 clients by secure aggregation" in page
    assert "Of the layers fc, head only" in page
    alone = Page(render(case, threat_model={**threat, "num_clients": 1, "visible_layers": None}))
    assert "Summed over" not in alone.text
    assert "Of the layers" not in alone.text


def test_every_status_has_a_meaning_and_knows_whether_it_is_returned():
    assert set(words.STATUS_MEANINGS) == {str(status) for status in Status}
    for status in Status:
        returned = "not returned" not in words.STATUS_MEANINGS[status]
        assert returned == status.accepted
        result = {"scores": None, "attack": {"status_counts": {str(status): 1}}}
        assert words.num_accepted(result) == int(status.accepted)


def test_optional_metrics_and_notes_are_shown_only_if_given(case):
    assert "LPIPS" not in render(case)
    case.result["scores"]["lpips"] = {"per_image": [0.0, 0.1, 0.25, None], "median": 0.125}
    case.result["scores"]["ssim"]["note"] = "SSIM needs <11> pixels."
    text = Page(render(case)).text
    assert "Median LPIPS0.125" in text
    assert "Learned perceptual distance" in text
    assert "SSIM needs <11> pixels." in text


def test_reconstructions_matched_to_nothing_are_mentioned(make_case):
    case = make_case(unmatched=0)
    case.result["scores"]["num_reconstructed"] = 6
    assert "2 further reconstructions matched no true image" in render(case)


def test_arguments_that_disagree_are_rejected(case):
    with pytest.raises(ValueError, match="go together"):
        render_html(case.result, None, case.aligned)
    with pytest.raises(ValueError, match="go together"):
        render_html(untruthed(case), case.originals, case.aligned)
    with pytest.raises(ValueError, match="4 true images"):
        render_html(case.result, case.originals[:3], case.aligned[:3])
    with pytest.raises(ValueError, match="aligned with the 4 originals"):
        render_html(case.result, case.originals, case.aligned[:3])
    with pytest.raises(ValueError, match="statuses must have one entry"):
        render_html(case.result, case.originals, case.aligned, statuses=["exact"])
    with pytest.raises(ValueError, match="must have shape"):
        report_images.check_aligned([np.zeros((8, 9, 3), np.float32)] * 4, case.originals)


def test_many_images_are_cut_and_said_so(make_case, monkeypatch):
    monkeypatch.setattr(pairs, "MAX_SHOWN", 5)
    case = make_case(9)
    page = Page(render(case))
    assert len(page.all("li")) == 5
    assert "The first 5 of 9 are shown." in page.text


def test_page_of_many_large_images_stays_small(make_case, monkeypatch):
    case = make_case(6, (64, 48, 3))
    whole = render(case)
    monkeypatch.setattr(pairs, "_IMAGE_BUDGET", 30_000)
    small = render(case)
    images = [a["src"] for a in Page(small).all("img")]
    assert sum(map(len, images)) <= 30_000 < sum(len(a["src"]) for a in Page(whole).all("img"))
    assert pixels(images[0]).shape == (16, 12, 3)
    assert "averaged over 4 × 4 pixels" in small
    assert "averaged over" not in whole


def test_512_pairs_fit_below_8_mb():
    """The budget bounds the images; what surrounds each pair is bounded here."""
    pair = pairs._pair(
        511, "", "", psnr=123.4, status="not_converged", label="automobile", scored=True
    )
    assert pairs._IMAGE_BUDGET + pairs.MAX_SHOWN * len(pair) < 7_000_000


def test_shrink_is_a_block_mean():
    tile = np.arange(5 * 4 * 1, dtype=np.uint8).reshape(5, 4, 1)
    small = report_images.shrink(tile, 2)
    assert small.shape == (3, 2, 1)
    assert small[0, 0, 0] == round((0 + 1 + 4 + 5) / 4)
    assert small[2, 1, 0] == round((18 + 19) / 2)  # the last row stands for both rows
    np.testing.assert_array_equal(report_images.shrink(tile, 1), tile)


def test_to_bytes_inverts_division_by_255_and_survives_failed_images():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    got = report_images.to_bytes(values.astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(got, values)
    odd = np.array([[[np.nan], [np.inf], [-1.0], [2.0]]])
    np.testing.assert_array_equal(report_images.to_bytes(odd)[0, :, 0], [0, 0, 0, 255])


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        (np.zeros((2, 4, 4, 2)), "C 1"),
        (np.zeros((4, 4, 3)), "shape"),
        (np.zeros((2, 0, 4, 3)), "shape"),
        (np.zeros((2, 4, 4, 3), np.uint8), "divide 8-bit"),
    ],
)
def test_images_of_the_wrong_kind_are_rejected(images, problem):
    with pytest.raises(ValueError, match=problem):
        report_images.check_images("originals", images)


def _luminance(color: str) -> float:
    color = color if len(color) == 6 else "".join(2 * digit for digit in color)
    channels = [int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_contrast_in_light_dark_and_print(case):
    """WCAG 2.1, success criteria 1.4.3 (text) and 1.4.11 (marks)."""
    assert _contrast("fff", "000") == pytest.approx(21)
    themes = re.findall(r":root \{(.*?)\}", Page(render(case)).css, re.DOTALL)
    assert len(themes) == 3
    for theme in themes:
        colors = dict(re.findall(r"--(\w+): #([0-9a-f]+);", theme))
        for background in ("paper", "panel"):
            assert _contrast(colors["ink"], colors[background]) >= 7
            assert _contrast(colors["soft"], colors[background]) >= 4.5
        for mark in ("leak", "partial", "poor"):
            assert _contrast(colors[mark], colors["paper"]) >= 3
