"""Where each layer stands in the error plot."""

from __future__ import annotations

import pytest

from pocketsize.recipes.record import LayerReport
from pocketsize.reporting.layers import MOST_COLUMNS, MOST_PANELS, layout, place
from reporting.records import layers


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("model.layers.12.self_attn.q_proj.weight", 12, "self_attn.q_proj"),
        ("encoder.layer.3.attention.self.query.weight", 3, "attention.self.query"),
        ("model.layers.2.mlp.experts.17.up_proj.weight", 2, "mlp.experts.*.up_proj"),
        ("model.embed_tokens.weight", None, "model.embed_tokens"),
        ("7.weight", None, "7"),
        ("", None, ""),
    ],
)
def test_place(name: str, block: int | None, kind: str) -> None:
    assert place(name) == (block, kind)


def test_a_panel_for_each_kind_and_a_column_for_each_block() -> None:
    placed = layout((*layers(30), LayerReport("lm_head.weight", 2, 2, 8, 8.5, 0.0, 0.0)))
    assert [len(panel.columns) for panel in placed.panels] == [30] * 7
    assert placed.last_block == 29 and [layer.name for layer in placed.outside] == ["lm_head.weight"]
    first = placed.panels[0].columns[0]
    report = layers(30)[0]
    assert (first.error, first.rtn_error) == pytest.approx((report.error, report.rtn_error))


def test_many_blocks_share_columns_and_lose_no_layer() -> None:
    placed = layout(layers(2000))
    for panel in placed.panels:
        assert len(panel.columns) <= MOST_COLUMNS
        assert sum(column.layers for column in panel.columns) == 2000
        assert all(c.low <= c.error <= c.high for c in panel.columns)
        assert all(a.last < b.first for a, b in zip(panel.columns, panel.columns[1:], strict=False))


def test_what_has_no_room_or_no_number_is_counted_or_left_out() -> None:
    many = [LayerReport(f"h.0.kind{i}x.weight", 1, 1, 4, 4.0, 0.1, 0.2) for i in range(MOST_PANELS + 3)]
    assert layout(many).left_out == 3
    broken = LayerReport("h.0.a.weight", 1, 1, 4, 4.0, float("nan"), 0.2)
    assert layout([broken]).panels == ()
    assert layout([]).panels == ()
