"""What a model got right and wrong: the confusion matrix, and sample predictions where a run kept some."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from bigtrain.report.words import count, escape
from bigtrain.tracking.reading import RunRecord

_MOST_CLASSES = 50
_MOST_CELLS_SIDE = 30  # a larger matrix is a list of the pairs that are confused most


def confusion_matrix(run: RunRecord) -> str:
    """Rows are labels, columns predictions; a cell's shade is its share of its row."""
    held = (run.result.get("metrics") or {}).get("confusion_matrix")
    if not isinstance(held, list) or not held or not isinstance(held[0], list):
        return ""
    matrix = np.asarray(held, np.int64)
    names = _names(run, len(matrix))
    return _grid(matrix, names) if len(matrix) <= _MOST_CELLS_SIDE else _pairs(matrix, names)


def by_class(run: RunRecord) -> str:
    """Precision, recall and F1 of every class, the one that is found least often first."""
    held = (run.result.get("metrics") or {}).get("confusion_matrix")
    if not isinstance(held, list) or not held or not isinstance(held[0], list):
        return ""
    matrix = np.asarray(held, np.int64)
    names, right = _names(run, len(matrix)), matrix.diagonal()
    support, taken = matrix.sum(1), matrix.sum(0)
    order = sorted(range(len(matrix)), key=lambda label: (support[label] == 0, right[label] / max(support[label], 1)))
    rows = "".join(
        f"<tr><td>{escape(names[label])}</td>"
        + "".join(
            f'<td class="n">{"–" if not of else f"{part / of:.4f}"}</td>'
            for part, of in (
                (right[label], support[label]),
                (right[label], taken[label]),
                (2 * right[label], support[label] + taken[label]),
            )
        )
        + f'<td class="n">{int(support[label]):,}</td></tr>'
        for label in order[:_MOST_CLASSES]
    )
    more = f'<p class="note">and {len(matrix) - _MOST_CLASSES} more</p>' if len(matrix) > _MOST_CLASSES else ""
    heads = "".join(f'<th class="n">{word}</th>' for word in ("recall", "precision", "F1", "samples"))
    return f"<table><tr><th>class</th>{heads}</tr>{rows}</table>{more}"


def _names(run: RunRecord, size: int) -> list[str]:
    names = run.result.get("class_names")
    return [str(name) for name in names] if isinstance(names, list) and len(names) == size else [*map(str, range(size))]


def _grid(matrix: Any, names: list[str]) -> str:
    totals = np.maximum(matrix.sum(1, keepdims=True), 1)
    shares = matrix / totals
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = []
    for label, (cells, row) in enumerate(zip(matrix, shares, strict=True)):
        drawn = []
        for predicted, (value, share) in enumerate(zip(cells, row, strict=True)):
            title = f"{names[label]} taken for {names[predicted]}: {count(int(value), 'time')}, {share:.1%}"
            strong = ' class="strong"' if share > 0.55 else ""
            shade = f"background:rgba(var(--heat),{0.06 + 0.94 * share:.2f})" if value else ""
            drawn.append(f'<td{strong} style="{shade}" title="{escape(title)}">{int(value) or ""}</td>')
        rows.append(f"<tr><th>{escape(names[label])}</th>{''.join(drawn)}</tr>")
    return (
        f'<table class="matrix"><tr><th></th>{head}</tr>{"".join(rows)}</table>'
        '<p class="note">rows: labels, columns: predictions</p>'
    )


def _pairs(matrix: Any, names: list[str]) -> str:
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(wrong, axis=None)[::-1][:20]
    rows = []
    for place in order:
        label, predicted = divmod(int(place), len(matrix))
        value = int(wrong[label, predicted])
        if value:
            share = value / max(int(matrix[label].sum()), 1)
            rows.append(
                f"<tr><td>{escape(names[label])}</td><td>{escape(names[predicted])}</td>"
                f'<td class="n">{value:,}</td><td class="n">{share:.1%}</td></tr>'
            )
    head = '<tr><th>label</th><th>taken for</th><th class="n">times</th><th class="n">share of the label</th></tr>'
    return f"<table>{head}{''.join(rows)}</table>" if rows else "<p>nothing was confused</p>"


def samples(run: RunRecord) -> str:
    """Sample predictions, as a run's samples.json keeps them."""
    try:
        held = json.loads((run.path / "samples.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    held = [sample for sample in held if isinstance(sample, dict)] if isinstance(held, list) else []
    names = run.result.get("class_names")
    images = [_image(sample, names) for sample in held if "image" in sample]
    texts = [_text(sample) for sample in held if "text" in sample]
    return (f'<div class="samples">{"".join(images)}</div>' if images else "") + (
        f'<div class="texts">{"".join(texts)}</div>' if texts else ""
    )


def _image(sample: dict[str, Any], names: Any) -> str:
    is_right = sample.get("prediction") == sample.get("target")
    source = str(sample["image"])
    if not source.startswith("data:image/png;base64,"):
        return ""
    sure = f" {sample['confidence']:.0%}" if isinstance(sample.get("confidence"), float) else ""
    label = "" if is_right else f"<br>is {_class(sample.get('target'), names)}"
    return (
        f'<figure class="{"right" if is_right else "wrong"}"><img alt="" src="{escape(source)}">'
        f"<b>{_class(sample.get('prediction'), names)}</b>{sure}{label}</figure>"
    )


def _class(label: Any, names: Any) -> str:
    is_named = isinstance(names, list) and isinstance(label, int) and 0 <= label < len(names)
    return escape(names[label] if is_named else label)


def _text(sample: dict[str, Any]) -> str:
    target = f"<p>target: {escape(sample['target'])}</p>" if "target" in sample else ""
    guess = f"<p>prediction: <b>{escape(sample['prediction'])}</b></p>" if "prediction" in sample else ""
    return f"<div><pre>{escape(sample['text'])}</pre>{target}{guess}</div>"
