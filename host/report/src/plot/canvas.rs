//! What every picture is made of: text, lines and ticks on an SVG.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

const FONT: &str = "Inter, Helvetica, Arial, sans-serif";

/// A part of the picture, in pixels.
pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

pub(super) fn line(area: &Area, points: Vec<(i32, i32)>, style: ShapeStyle) -> std::result::Result<(), String> {
    area.draw(&PathElement::new(points, style)).map_err(text_of)
}

pub(super) fn dashed(area: &Area, left: i32, right: i32, y: i32, color: RGBColor) -> std::result::Result<(), String> {
    for x in (left..right).step_by(10) {
        line(area, vec![(x, y), ((x + 6).min(right), y)], color.stroke_width(2))?;
    }
    Ok(())
}

pub(super) fn text_of(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A text style under construction.
pub(super) struct TextKind {
    size_px: f64,
    color: RGBColor,
}

pub(super) fn text(size_px: f64, color: RGBColor) -> TextKind {
    TextKind { size_px, color }
}

impl TextKind {
    // The SVG back end divides a font's size by 1.24.
    fn style(&self, font_style: FontStyle) -> TextStyle<'static> {
        let mut style = TextStyle::from((FontFamily::Name(FONT), self.size_px * 1.24, font_style));
        style.color = self.color.to_backend_color();
        style
    }

    pub(super) fn bold(&self) -> TextStyle<'static> {
        self.style(FontStyle::Bold)
    }

    pub(super) fn plain(&self) -> TextStyle<'static> {
        self.style(FontStyle::Normal)
    }

    pub(super) fn at(&self, h: HPos, v: VPos) -> TextStyle<'static> {
        self.plain().pos(Pos::new(h, v))
    }
}

pub(super) fn extent(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)))
}

/// Round numbers (1, 2 or 5 times a power of ten apart) inside the range, about `wanted` of them.
pub(super) fn linear_ticks((low, high): (f64, f64), wanted: usize) -> Vec<f64> {
    let rough = (high - low) / wanted as f64;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= rough * 0.999).unwrap_or(power);
    let (first, last) = ((low / step - 1e-9).ceil() as i64, (high / step + 1e-9).floor() as i64);
    (first..=last).take(50).map(|i| i as f64 * step).filter(|t| t.is_finite()).collect()
}

/// A tick's value without the noise of its arithmetic.
pub(super) fn tick_text(value: f64) -> String {
    let magnitude = value.abs();
    if magnitude != 0.0 && !(1e-3..1e6).contains(&magnitude) {
        return format!("{value:.0e}");
    }
    let text = format!("{value:.6}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

pub(super) fn shortened(text: &str, chars_max: usize) -> String {
    if text.chars().count() <= chars_max {
        return text.to_owned();
    }
    text.chars().take(chars_max.saturating_sub(1)).chain(['…']).collect()
}
