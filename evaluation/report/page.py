"""The report as a single HTML file with embedded videos, scores with scales, and settings."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from evaluation.inputs import Video, Videos

TEMPLATE = Path(__file__).with_name("page.html")
# Rows shown at each end; the others are collapsed.
_SHOWN = 12
_MOST_IMAGES = 200
_STRIP = 12
# Large enough to view a video, and small enough for the size of the page.
_LONGEST_SIDE = 176
_SMALL = 96
_GROUPS = (
    ("", "Generated videos"),
    ("vbench/", "Generated videos by VBench"),
    ("tokenizer/", "The tokenizer on real clips"),
    ("unquantised/", "The tokenizer, latents not rounded to 8 bits"),
    ("bicubic/", "Bicubic scaling of every frame to as many values"),
    ("bicubic_time/", "Bicubic scaling in space and time to as many values"),
    ("h264/", "H.264 in as many bytes"),
    ("reconstruction/", "Real clips after the tokenizer"),
    ("reference/", "Real clips"),
)


class Html(str):
    """Text that is already markup and is not escaped."""


def html(template: str, *values: object) -> Html:
    """Fill ``{}`` of a template with values, each escaped unless it is ``Html``."""
    return Html(template.format(*map(_escaped, values)))


def joined(parts: Iterable[object], separator: str = "") -> Html:
    """Join parts, each escaped unless it is ``Html``."""
    return Html(separator.join(map(_escaped, parts)))


def _escaped(value: object) -> str:
    return value if isinstance(value, Html) else escape(str(value))


def page(report: Mapping[str, Any], videos: Videos, real: Videos | None, fps: float) -> str:
    """Return the page of a ``report`` in the format of ``write_report``.

    ``real`` are clips of the same prompts in the same order.
    """
    checkpoint = report["checkpoint"]
    subject = Html("a folder of videos")
    if checkpoint is not None:
        subject = html("<code>{}</code>, step {}", checkpoint["path"], f"{checkpoint['step']:,}")
    settings = report["settings"]
    contents = f"{settings['num_videos']} generated and {settings['num_reference']} real videos"
    parts = {
        "title": f"Evaluation, protocol {report['protocol']}",
        "subtitle": html("{}: {}", subject, report.get("contents", contents)),
        "tiles": joined(_tiles(report["details"]), "\n"),
        "strip": joined(_strip(report["videos"], videos, fps)),
        "scores": joined(_score_rows(report["details"]), "\n"),
        "order": _order_sentence(report, real is not None),
        "videos": _video_tables(report["videos"], videos, real, fps),
        "record": joined(_record_rows(report), "\n"),
    }
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute({name: _escaped(part) for name, part in parts.items()})


def number(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def shown(name: str, value: float) -> str:
    """Format a score for display: shares as per cent."""
    return percent(value) if "alignment/" in name else number(value)


def _tiles(details: Mapping[str, Mapping[str, Any]]) -> Iterator[Html]:
    for attribute in ("colour", "direction", "shape"):
        name = f"alignment/{attribute}"
        if name in details:
            yield _part_tile(name, details)
    for base, tile in _TILES.items():
        for name in details:
            if name.split("-")[0] == base and "/" not in name.removeprefix(base):
                yield tile(name, details)


def _tile(name: str, value: str, aside: str, scale: Html, note: str) -> Html:
    return html(
        '<div class="tile"><div class="name">{}</div>'
        '<div class="value">{} <small>{}</small></div>{}<div class="note">{}</div></div>',
        *(name, value, aside, scale, note),
    )


def _scale(fill: float, low: float, high: float, marks: Sequence[float]) -> Html:
    """A bar filled to ``fill``, a whisker from ``low`` to ``high``, and a tick at each mark, in
    0..1.
    """
    fill, low, high = (100 * min(max(v, 0.0), 1.0) for v in (fill, low, high))
    places = [f"{100 * min(max(mark, 0), 1):.2f}" for mark in marks]
    ticks = joined(html('<b style="left:calc({}% - 1px)"></b>', place) for place in places)
    return html(
        '<div class="scale"><i style="width:{}%"></i><u style="left:{}%;width:{}%"></u>{}</div>',
        *(f"{fill:.2f}", f"{low:.2f}", f"{high - low:.2f}", ticks),
    )


def _part_tile(name: str, details: Mapping[str, Mapping[str, Any]]) -> Html:
    score, ceiling = details[name], details.get(f"reconstruction/{name}")
    marks, note = [], f"of {score['n']} videos of one shape"
    if ceiling is not None:
        marks = [ceiling["value"]]
        note += f"; tick: real clips after the tokenizer, {percent(ceiling['value'])}"
    aside = f"{percent(score['low'])} to {percent(score['high'])}"
    scale = _scale(score["value"], score["low"], score["high"], marks)
    return _tile(name, percent(score["value"]), aside, scale, note)


def _distance_tile(name: str, details: Mapping[str, Mapping[str, Any]]) -> Html:
    beside = "half" if f"{name}/half" in details else "apart"
    score, half, floor = (
        details[f"{name}{part}"]["value"] for part in ("", f"/{beside}", "/floor")
    )
    low, high = details[name]["low"], details[name]["high"]
    top = 1.15 * max(high, half, floor)
    note = f"bar: {number(half)} with half of the videos; tick: {number(floor)} between real halves"
    if beside == "apart":
        note = f"bar: {number(half)} at the tick's sizes; tick: {number(floor)} between real videos"
    return _tile(
        f"{name}, lower is better",
        number(score),
        f"{number(low)} to {number(high)}",
        _scale(half / top, half / top, half / top, [floor / top]),
        note,
    )


def _clip_tile(name: str, details: Mapping[str, Mapping[str, Any]]) -> Html:
    score = details[name]
    real, chance = (details[f"{name}/{part}"]["value"] for part in ("reference", "shuffled"))
    bottom, top = chance - 0.15 * abs(real - chance), real + 0.15 * abs(real - chance)

    def place(value: float) -> float:
        return (value - bottom) / max(top - bottom, 1e-9)

    low, high = score["low"], score["high"]
    return _tile(
        name,
        number(score["value"]),
        f"{number(low)} to {number(high)}",
        _scale(place(score["value"]), place(low), place(high), [place(chance), place(real)]),
        f"ticks: {number(chance)} at chance level, {number(real)} for real clips",
    )


def _psnr_tile(name: str, details: Mapping[str, Mapping[str, Any]]) -> Html:
    psnr, ssim = details["tokenizer/psnr"], details["tokenizer/ssim"]
    scale = _scale(ssim["value"], ssim["low"], ssim["high"], [])
    note = f"bar: SSIM {number(ssim['value'])}; {psnr['n']} reconstructed real clips"
    aside = f"dB, {number(psnr['low'])} to {number(psnr['high'])}"
    return _tile(name, number(psnr["value"]), aside, scale, note)


_TILES = {
    "fvd": _distance_tile,
    "fid": _distance_tile,
    "clip_score": _clip_tile,
    "tokenizer/psnr": _psnr_tile,
}


def _strip(rows: Sequence[Mapping[str, Any]], videos: Videos, fps: float) -> Iterator[Html]:
    count = min(_STRIP, len(videos))
    for index in np.linspace(0, len(videos) - 1, count).round().astype(int).tolist():
        yield html(
            "<figure>{}<figcaption>{}</figcaption></figure>",
            *(_image(videos[index], fps), _title(rows[index])),
        )


def _title(row: Mapping[str, Any]) -> str:
    """The prompt of a video, or its file name without one."""
    return row["prompt"] or Path(row["path"]).name


def _score_rows(details: Mapping[str, Mapping[str, Any]]) -> Iterator[Html]:
    def group_of(name: str) -> str:
        return next((prefix for prefix, _ in _GROUPS[1:] if name.startswith(prefix)), "")

    for prefix, title in _GROUPS:
        members = {name: score for name, score in details.items() if group_of(name) == prefix}
        if members:
            yield html('<tr class="group"><td colspan="6">{}</td></tr>', title)
        for name, score in members.items():
            interval = ""
            if score["low"] is not None:
                interval = f"{shown(name, score['low'])} to {shown(name, score['high'])}"
            yield html(
                '<tr><td class="score"><code>{}</code></td><td class="n">{}</td>'
                '<td class="n">{}</td><td class="n">{}</td><td>{}</td>'
                '<td class="meaning">{}</td></tr>',
                *(name, shown(name, score["value"]), interval),
                *(score["n"], score["better"], score["meaning"]),
            )


def _clip_score_name(row: Mapping[str, Any]) -> str | None:
    """Name of the CLIP score of a video, if there is one."""
    return next((name for name in row if name.startswith("clip_score-")), None)


def _order_sentence(report: Mapping[str, Any], paired: bool) -> str:
    order, name = "Worst first", _clip_score_name(report["videos"][0])
    if "colour" in report["videos"][0]:
        order += f": by the number of correct attributes, then by {name}"
    elif name:
        order += f", by {name}"
    else:
        order = "In the order of the list"
    beside = " To the right of each: the real clip of the same prompt." if paired else ""
    return f"{order}.{beside}"


def _badness(row: Mapping[str, Any]) -> tuple[int, float]:
    right = sum(row.get(name, False) for name in ("colour", "direction", "shape"))
    return right, row.get(_clip_score_name(row) or "", 0.0)


def _video_tables(
    rows: Sequence[Mapping[str, Any]],
    videos: Videos,
    real: Videos | None,
    fps: float,
) -> Html:
    order = sorted(range(len(rows)), key=lambda i: _badness(rows[i]))
    sides = [videos] if real is None else [videos, real]
    # A page with thousands of videos would be too large for a browser.
    far_in = range(_SHOWN, len(order) - _SHOWN) if len(order) > _MOST_IMAGES else range(0)
    lines = [
        _video_row(rows[i], [] if n in far_in else [s[i] for s in sides], len(sides), fps)
        for n, i in enumerate(order)
    ]
    aligned = "colour" in rows[0]
    heads = ["generated", *(["real"] if real else []), "prompt", *(["found"] if aligned else [])]
    heads += ["colour", "direction", "shape"] if aligned else []
    clip_score = _clip_score_name(rows[0])
    numbers = [*([clip_score] if clip_score else []), "seed"]
    header = joined(html("<th>{}</th>", head) for head in heads)
    header = joined([header, *(html('<th class="n">{}</th>', number) for number in numbers)])

    def table(part: Sequence[Html]) -> Html:
        return html('<table class="videos"><tr>{}</tr>{}</table>', header, joined(part))

    if len(lines) <= 2 * _SHOWN:
        return table(lines)
    middle = lines[_SHOWN:-_SHOWN]
    return html(
        "{}<details><summary>{} videos between</summary>"
        "{}</details><p class='faint'>The best:</p>{}",
        *(table(lines[:_SHOWN]), len(middle), table(middle), table(lines[-_SHOWN:])),
    )


def _video_row(row: Mapping[str, Any], videos: list[Video], num_sides: int, fps: float) -> Html:
    """Row of a generated video, and of the real one if there are two sides.

    Without ``videos``, their cells are empty.
    """
    cells = [html("<td>{}</td>", _image(one, fps)) for one in videos]
    cells = cells or [Html("<td></td>")] * num_sides
    cells.append(html("<td>{}</td>", _title(row)))
    if "colour" in row:
        found = joined(row["found"], "<br>") or "nothing"
        cells.append(html('<td class="faint">{}</td>', found))
        for name in ("colour", "direction", "shape"):
            kind, word = ("yes", "right") if row[name] else ("no", "wrong")
            cells.append(html('<td class="{}">{}</td>', kind, word))
    if clip_score := _clip_score_name(row):
        cells.append(html('<td class="n">{}</td>', f"{row[clip_score]:.1f}"))
    cells.append(html('<td class="n">{}</td>', row.get("seed", "")))
    return html("<tr>{}</tr>", joined(cells))


def _image(video: Video, fps: float) -> Html:
    frames = [Image.fromarray(frame) for frame in video]
    if max(frames[0].size) > _LONGEST_SIDE:
        for frame in frames:
            frame.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    # Lossy coding halves the resolution of colour, which would blur small shapes.
    lossless = max(frames[0].size) <= _SMALL
    buffer = io.BytesIO()
    duration = round(1000 / fps)
    frames[0].save(
        buffer,
        "WEBP",
        save_all=True,
        append_images=frames[1:],
        duration=duration,
        loop=0,
        quality=90,
        lossless=lossless,
    )
    data = base64.b64encode(buffer.getvalue()).decode()
    return html('<img src="data:image/webp;base64,{}" alt="">', data)


def _record_rows(report: Mapping[str, Any]) -> Iterator[Html]:
    settings, checkpoint = report["settings"], report["checkpoint"]
    networks = settings["networks"]
    values = {
        "fingerprint": report["fingerprint"],
        "protocol": report["protocol"],
        "clips": ", ".join(f"{key} {value}" for key, value in settings["clips"].items()),
        "scores": ", ".join(f"{key} {value}" for key, value in settings["scores"].items()),
        "sampling": ", ".join(f"{key} {_spread(v)}" for key, v in settings["sampling"].items()),
        "real videos": f"{report['reference']}, sha256 {settings['reference_sha256']}",
        "prompts": f"sha256 {settings['prompts_sha256']}",
        "networks": ", ".join(f"{key} {value}" for key, value in report["networks"].items()),
        **{f"network for {key}": _listed(value) for key, value in networks.items()},
        "versions": ", ".join(f"{key} {value}" for key, value in report["versions"].items()),
        "left out": "; ".join(report.get("left_out", [])) or "nothing",
        "device": report["device"],
        "time": f"{report['seconds']} s",
    }
    if checkpoint is not None:
        values["checkpoint"] = f"{checkpoint['path']}, sha256 {checkpoint['sha256']}"
    for name, value in values.items():
        yield html("<dt>{}</dt><dd><code>{}</code></dd>", name, value)


def _listed(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{key} {one}" for key, one in value.items())


def _spread(values: Sequence[Any]) -> str:
    return f"{values[0]} to {values[-1]}" if len(values) > 3 else ", ".join(map(str, values))
