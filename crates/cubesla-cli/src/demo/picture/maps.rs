//! The chosen blocks and the true attention of one head, and the colour scale.

use cubesla_reference::Tensor;
use cubesla_reference::attention::{Causal, forward};
use cubesla_reference::blocks::BlockWeights;
use cubesla_reference::router::mean_pool;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::{Layer, Run, whole};
use crate::plot::{Area, DrawResult, FAINT, INK, PALE, text};

/// Cells along an axis of the attention map; longer sequences are pooled.
const MAX_CELLS: usize = 256;
/// Decades of attention on either side of uniform that colours tell apart.
const DECADES: f64 = 2.0;
/// Blocks along an axis up to which each has an outline.
const MAX_OUTLINED: usize = 64;
/// Width of the colour scale beside the two maps.
const SCALE_WIDTH: u32 = 150;

const CHOSEN: RGBColor = RGBColor(49, 104, 142);

type Chart<'a, 'b> =
    ChartContext<'a, BitMapBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

pub fn draw(area: &Area<'_>, layer: &Layer, run: &Run, head: usize) -> DrawResult {
    let (width, _) = area.dim_in_pixel();
    let (left, rest) = area.split_horizontally((width - SCALE_WIDTH) / 2);
    let (right, scale) = rest.split_horizontally((width - SCALE_WIDTH) / 2);
    draw_blocks(&left, run, head)?;
    draw_attention(&right, layer, head)?;
    draw_scale(&scale)
}

fn draw_blocks(area: &Area<'_>, run: &Run, head: usize) -> DrawResult {
    let [_, _, query_blocks, key_blocks] = run.list.shape();
    let title = format!(
        "Exact attention at {} %: {} of {key_blocks} blocks, {:.0} % of the attention",
        run.sparsity,
        run.list.width(),
        100.0 * run.head_mass[head]
    );
    let mut chart = axes(
        area,
        &title,
        ["key block", "query block"],
        [query_blocks, key_blocks],
    )?;
    for i in 0..query_blocks {
        let row = run.list.row(head * query_blocks + i);
        for j in 0..key_blocks {
            let chosen = row.contains(&(j as u32));
            let colour = if chosen { CHOSEN } else { PALE };
            let (x, y) = (j as f64, -(i as f64));
            let corners = [(x, y), (x + 1.0, y - 1.0)];
            chart.draw_series([Rectangle::new(corners, colour.filled())])?;
            if key_blocks.max(query_blocks) <= MAX_OUTLINED {
                chart.draw_series([Rectangle::new(corners, WHITE)])?;
            }
        }
    }
    Ok(())
}

fn draw_attention(area: &Area<'_>, layer: &Layer, head: usize) -> DrawResult {
    let sizes = [layer.problem.query_len(), layer.problem.key_len()];
    let title = format!("True attention of head {head}, relative to uniform");
    let mut chart = axes(area, &title, ["key", "query"], sizes)?;
    let map = attention_map(layer, head);
    let [_, _, rows, cols] = map.shape();
    for i in 0..rows {
        for j in 0..cols {
            let [top, bottom] = edges(i, sizes[0]);
            let [left, right] = edges(j, sizes[1]);
            let shade = colour(map[[0, 0, i, j]].log10());
            let corners = [(left, -top), (right, -bottom)];
            chart.draw_series([Rectangle::new(corners, shade.filled())])?;
        }
    }
    Ok(())
}

/// How many times the uniform weight `1 / Lk` the keys of each cell get from its queries, on average.
fn attention_map(layer: &Layer, head: usize) -> Tensor {
    let p = &layer.problem;
    let (b, h) = (head / p.query_heads(), head % p.query_heads());
    let kv = h / (p.query_heads() / p.kv_heads());
    let (query_len, key_len, dim) = (p.query_len(), p.key_len(), p.head_dim());
    let q = Tensor::from_fn([1, 1, query_len, dim], |[_, _, i, d]| layer.q[[b, h, i, d]]);
    let k = Tensor::from_fn([1, 1, key_len, dim], |[_, _, j, d]| layer.k[[b, kv, j, d]]);

    // Where values name the cell of their key, attention's output is what each cell gets.
    let cells = key_len.div_ceil(pooled(key_len));
    let cell_of = Tensor::from_fn([1, 1, key_len, cells], |[_, _, j, cell]| {
        let [first, end] = edges(cell, key_len);
        let inside = (first..end).contains(&(j as f64));
        if inside {
            key_len as f64 / (end - first)
        } else {
            0.0
        }
    });
    let all = BlockWeights::dense([1, 1, query_len, key_len], query_len, key_len);
    let scale = f64::from(p.scale());
    let received = forward(&q, &k, &cell_of, &all, scale, Causal::None).out;
    mean_pool(&received, pooled(query_len))
}

/// Positions that share a cell of the map along an axis.
fn pooled(len: usize) -> usize {
    len.div_ceil(MAX_CELLS)
}

/// First position of a cell and the end of its last.
fn edges(cell: usize, len: usize) -> [f64; 2] {
    let first = cell * pooled(len);
    [first as f64, len.min(first + pooled(len)) as f64]
}

fn draw_scale(area: &Area<'_>) -> DrawResult {
    let (_, height) = area.dim_in_pixel();
    let (top, bottom) = (56, height as i32 - 78);
    let at = |decades: f64| {
        let share = (decades + DECADES) / (2.0 * DECADES);
        bottom - (share * f64::from(bottom - top)) as i32
    };
    for y in top..bottom {
        let share = f64::from(bottom - y) / f64::from(bottom - top);
        let shade = colour(DECADES * (2.0 * share - 1.0));
        area.draw(&Rectangle::new([(6, y), (32, y + 1)], shade.filled()))?;
    }
    let style = text(area, 17);
    for (decades, label) in [
        (-2.0, "1/100"),
        (-1.0, "1/10"),
        (0.0, "uniform"),
        (1.0, "10x"),
        (2.0, "100x"),
    ] {
        let y = at(decades);
        area.draw(&PathElement::new([(32, y), (38, y)], INK))?;
        area.draw_text(label, &style, (44, y - 8))?;
    }
    Ok(())
}

fn colour(decades: f64) -> RGBColor {
    ViridisRGB.get_color_normalized(decades.clamp(-DECADES, DECADES), -DECADES, DECADES)
}

/// Axes over `[rows, columns]`; row `i` lies at `-i`, so that row 0 is at the top.
fn axes<'a, 'b>(
    area: &'a Area<'b>,
    title: &str,
    [x, y]: [&str; 2],
    [rows, cols]: [usize; 2],
) -> DrawResult<Chart<'a, 'b>> {
    let (height, width) = (rows as f64, cols as f64);
    let mut chart = ChartBuilder::on(area)
        .caption(title, text(area, 21))
        .margin(16)
        .margin_left(32)
        .x_label_area_size(54)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..width, -height..0.0)?;
    chart
        .configure_mesh()
        .disable_mesh()
        .x_desc(x)
        .y_desc(y)
        .axis_style(FAINT)
        .axis_desc_style(text(area, 18))
        .label_style(text(area, 16))
        .x_label_formatter(&whole)
        .y_label_formatter(&whole)
        .draw()?;
    Ok(chart)
}
