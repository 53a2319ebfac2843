//! The learning curve: what the student answers right, and how far it is from the teacher, step by step.

use std::path::Path;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};

use super::canvas::{Area, dashed, extent, line, linear_ticks, shortened, text, text_of, tick_text};
use crate::folder::replace_file;
use crate::format::{format_number, format_percent};
use crate::{ReportError, Result};

const WIDTH_PX: u32 = 880;
const HEADER_PX: u32 = 72;
const PANEL_PX: u32 = 330;
const MARGIN_LEFT_PX: i32 = 84;
const MARGIN_RIGHT_PX: i32 = 28;
const MARGIN_BOTTOM_PX: i32 = 54;
const LEGEND_ROW_PX: i32 = 22;

const STUDENT: RGBColor = RGBColor(29, 78, 216);
const STUDENT_START: RGBColor = RGBColor(120, 130, 150);
const TEACHER: RGBColor = RGBColor(217, 119, 6);
const KL_EACH: RGBColor = RGBColor(167, 200, 190);
const KL_MEAN: RGBColor = RGBColor(15, 118, 110);
const INK: RGBColor = RGBColor(31, 41, 55);
const QUIET_INK: RGBColor = RGBColor(107, 114, 128);
const GRID: RGBColor = RGBColor(229, 231, 235);
const AXIS: RGBColor = RGBColor(156, 163, 175);

/// From this many points on, the KL panel shows a running mean over the single steps.
const SMOOTH_FROM_POINTS: usize = 24;
/// Longest line that is drawn point by point; a longer one is thinned, which the eye cannot tell at 880 pixels.
const POINTS_MAX: usize = 4000;

/// The learning curve of a run. Points that are not finite are left out, and KL points of zero or less have no place on
/// the logarithmic axis.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LearningCurve {
    /// Headline, such as the name of the run.
    pub title: String,
    /// A second line, such as the models and the seed; may be empty.
    pub subtitle: String,
    /// What the upper panel shows, such as `accuracy on held-out problems`.
    pub validation_name: String,
    /// (step, validation reward) of the student; accuracies between 0 and 1 are drawn as percentages.
    pub student: Vec<(u64, f64)>,
    /// The student before training: a line to measure progress by.
    pub student_start: Option<f64>,
    /// The teacher on the same problems.
    pub teacher: Option<f64>,
    /// (step, mean KL per token in nats) of training; an empty list leaves the lower panel out.
    pub kl: Vec<(u64, f64)>,
}

impl LearningCurve {
    /// Draws the curve as SVG and writes it to `path`, replacing what is there.
    ///
    /// # Errors
    /// [`ReportError::NothingToPlot`] without a finite point, [`ReportError::CannotWrite`].
    pub fn write(&self, path: &Path) -> Result<()> {
        replace_file(path, self.to_svg()?.as_bytes())
    }

    /// The curve as an SVG document.
    ///
    /// # Errors
    /// [`ReportError::NothingToPlot`] without a finite point.
    pub fn to_svg(&self) -> Result<String> {
        let panels: Vec<Panel> = [self.validation_panel(), self.kl_panel()].into_iter().flatten().collect();
        let steps = || panels.iter().flat_map(|p| &p.series).flat_map(|s| &s.points).map(|p| p.0);
        let last_step = steps().fold(f64::NEG_INFINITY, f64::max);
        if !last_step.is_finite() {
            return Err(ReportError::NothingToPlot);
        }
        let first_step = steps().fold(f64::INFINITY, f64::min).min(0.0);
        // A run of one point still needs an axis with two ends.
        let x_range = (first_step, last_step.max(first_step + 1.0));
        let mut svg = String::new();
        let height = HEADER_PX + PANEL_PX * panels.len() as u32;
        {
            let area = SVGBackend::with_string(&mut svg, (WIDTH_PX, height)).into_drawing_area();
            draw(&area, self, &panels, x_range).map_err(|reason| ReportError::Plot { reason })?;
        }
        Ok(svg)
    }

    fn validation_panel(&self) -> Option<Panel> {
        let student = finite(&self.student, |_| true);
        let levels = [self.student_start, self.teacher].map(|level| level.filter(|v| v.is_finite()));
        let (first, last) = (student.first()?.1, student.last()?.1);
        let values = || student.iter().map(|p| p.1).chain(levels.into_iter().flatten());
        let (low, high) = extent(values());
        let fraction = low >= 0.0 && high <= 1.0;
        let show: fn(f64) -> String = if fraction { format_percent } else { format_number };
        let y_range = if fraction {
            (0.0, (high * 1.08 * 20.0).ceil().clamp(1.0, 20.0) / 20.0)
        } else {
            let pad = ((high - low) * 0.06).max(low.abs().max(high.abs()) * 1e-6).max(1e-9);
            (if low >= 0.0 && low < high { 0.0 } else { low - pad }, high + pad)
        };
        let ends = (student[0].0, student[student.len() - 1].0);
        let mut series = Vec::new();
        let mut level = |value: Option<f64>, label: &str, color| {
            if let Some(value) = value {
                let points = vec![(f64::NAN, value)];
                series.push(Series { label: format!("{label} {}", show(value)), points, color, stroke: Stroke::Level });
            }
        };
        level(levels[1], "teacher", TEACHER);
        level(levels[0], "student before", STUDENT_START);
        let label = if ends.0 < ends.1 {
            format!("student {} → {}", show(first), show(last))
        } else {
            format!("student {}", show(last))
        };
        series.push(Series { label, points: student, color: STUDENT, stroke: Stroke::LineWithPoints });
        let name = if self.validation_name.is_empty() { "validation reward" } else { &self.validation_name };
        Some(Panel {
            title: capitalized(name),
            y_name: if fraction { "share of problems" } else { "reward" },
            y_range,
            y_ticks: linear_ticks(y_range, 6)
                .into_iter()
                .map(|t| (t, if fraction { format!("{} %", (t * 1000.0).round() / 10.0) } else { tick_text(t) }))
                .collect(),
            series,
        })
    }

    fn kl_panel(&self) -> Option<Panel> {
        // Drawn on a linear axis of the logarithm, so that the ticks are ours to choose.
        let each: Vec<_> = finite(&self.kl, |v| v > 0.0).into_iter().map(|(x, v)| (x, v.log10())).collect();
        let (low, high) = extent(each.iter().map(|p| p.1));
        if each.is_empty() {
            return None;
        }
        let pad = ((high - low) * 0.06).max(0.05);
        let y_range = (low - pad, high + pad);
        let mut series = Vec::new();
        let mut ends = (each[0].1, each[each.len() - 1].1);
        if each.len() >= SMOOTH_FROM_POINTS {
            let mean = running_mean(&each, (each.len() / 24).max(4));
            ends = (mean[0].1, mean[mean.len() - 1].1);
            series.push(Series { label: "each step".into(), points: each, color: KL_EACH, stroke: Stroke::Thin });
            series.push(Series { label: "running mean".into(), points: mean, color: KL_MEAN, stroke: Stroke::Line });
        } else {
            series.push(Series {
                label: "each step".into(),
                points: each,
                color: KL_MEAN,
                stroke: Stroke::LineWithPoints,
            });
        }
        if let Some(last) = series.last_mut() {
            let (from, to) = (10_f64.powf(ends.0), 10_f64.powf(ends.1));
            last.label = format!("{} {} → {}", last.label, format_number(from), format_number(to));
        }
        Some(Panel {
            title: "KL between student and teacher".into(),
            y_name: "nats per token (log)",
            y_range,
            y_ticks: log_ticks(y_range).into_iter().map(|t| (t.log10(), tick_text(t))).collect(),
            series,
        })
    }
}

struct Panel {
    title: String,
    y_name: &'static str,
    y_range: (f64, f64),
    y_ticks: Vec<(f64, String)>,
    series: Vec<Series>,
}

struct Series {
    label: String,
    points: Vec<(f64, f64)>,
    color: RGBColor,
    stroke: Stroke,
}

#[derive(Clone, Copy, PartialEq)]
enum Stroke {
    /// A dashed line over the whole width at the height of the only point.
    Level,
    Line,
    LineWithPoints,
    Thin,
}

fn draw(area: &Area, curve: &LearningCurve, panels: &[Panel], x_range: (f64, f64)) -> std::result::Result<(), String> {
    area.fill(&WHITE).map_err(text_of)?;
    let title = if curve.title.is_empty() { "Learning curve" } else { &curve.title };
    // Long titles would run out of the picture: 0.56 em is a wide average for a sans-serif letter.
    let room = |size_px: f64| ((f64::from(WIDTH_PX) - 56.0) / (0.56 * size_px)) as usize;
    area.draw_text(&shortened(title, room(20.0)), &text(20.0, INK).bold(), (28, 20)).map_err(text_of)?;
    area.draw_text(&shortened(&curve.subtitle, room(13.0)), &text(13.0, QUIET_INK).plain(), (28, 48))
        .map_err(text_of)?;
    let (_, below) = area.split_vertically(HEADER_PX);
    for (panel, part) in panels.iter().zip(below.split_evenly((panels.len(), 1))) {
        draw_panel(&part, panel, x_range)?;
    }
    area.present().map_err(text_of)
}

fn draw_panel(area: &Area, panel: &Panel, x_range: (f64, f64)) -> std::result::Result<(), String> {
    let (width, height) = (area.dim_in_pixel().0 as i32, area.dim_in_pixel().1 as i32);
    area.draw_text(&shortened(&panel.title, 90), &text(15.0, INK).bold(), (28, 6)).map_err(text_of)?;
    let legend_bottom = draw_legend(area, &panel.series, 28, 32, width - MARGIN_RIGHT_PX)?;
    let (left, right) = (MARGIN_LEFT_PX, width - MARGIN_RIGHT_PX);
    let (top, bottom) = (legend_bottom + 8, height - MARGIN_BOTTOM_PX);
    let x_px = |x: f64| left + ((x - x_range.0) / (x_range.1 - x_range.0) * f64::from(right - left)).round() as i32;
    let (y_low, y_high) = panel.y_range;
    let y_px = |y: f64| bottom - ((y - y_low) / (y_high - y_low) * f64::from(bottom - top)).round() as i32;

    for (value, label) in &panel.y_ticks {
        let y = y_px(*value);
        line(area, vec![(left, y), (right, y)], GRID.stroke_width(1))?;
        area.draw_text(label, &text(12.0, QUIET_INK).at(HPos::Right, VPos::Center), (left - 8, y)).map_err(text_of)?;
    }
    for value in linear_ticks(x_range, 8).into_iter().filter(|v| v.fract() == 0.0) {
        let x = x_px(value);
        line(area, vec![(x, bottom), (x, bottom + 5)], AXIS.stroke_width(1))?;
        let style = text(12.0, QUIET_INK).at(HPos::Center, VPos::Top);
        area.draw_text(&tick_text(value), &style, (x, bottom + 8)).map_err(text_of)?;
    }
    line(area, vec![(left, bottom), (right, bottom)], AXIS.stroke_width(1))?;
    let style = text(12.0, INK).at(HPos::Center, VPos::Top);
    area.draw_text("training step", &style, ((left + right) / 2, bottom + 26)).map_err(text_of)?;
    let style = style.transform(FontTransform::Rotate270);
    area.draw_text(panel.y_name, &style, (22, (top + bottom) / 2)).map_err(text_of)?;

    for series in &panel.series {
        let points: Vec<(i32, i32)> = thinned(&series.points).map(|(x, y)| (x_px(x), y_px(y))).collect();
        match series.stroke {
            Stroke::Level => {
                let y = series.points.first().map(|p| y_px(p.1)).unwrap_or(bottom);
                dashed(area, left, right, y, series.color)?;
            }
            Stroke::Thin => line(area, points, series.color.stroke_width(1))?,
            Stroke::Line => line(area, points, series.color.stroke_width(2))?,
            Stroke::LineWithPoints => {
                line(area, points.clone(), series.color.stroke_width(2))?;
                // Many points would hide the line they sit on.
                for point in points.iter().filter(|_| points.len() <= 80) {
                    area.draw(&Circle::new(*point, 4, WHITE.filled())).map_err(text_of)?;
                    area.draw(&Circle::new(*point, 3, series.color.filled())).map_err(text_of)?;
                }
            }
        }
    }
    Ok(())
}

/// Swatches and labels in rows from (`left`, `top`); returns where they end.
fn draw_legend(area: &Area, series: &[Series], left: i32, top: i32, right: i32) -> std::result::Result<i32, String> {
    let (mut x, mut y) = (left, top);
    for entry in series {
        let width = 32 + (entry.label.chars().count() as f64 * 13.0 * 0.56) as i32 + 18;
        if x > left && x + width > right {
            (x, y) = (left, y + LEGEND_ROW_PX);
        }
        let middle = y + LEGEND_ROW_PX / 2;
        match entry.stroke {
            Stroke::Level => dashed(area, x, x + 24, middle, entry.color)?,
            Stroke::Thin => line(area, vec![(x, middle), (x + 24, middle)], entry.color.stroke_width(2))?,
            Stroke::Line | Stroke::LineWithPoints => {
                line(area, vec![(x, middle), (x + 24, middle)], entry.color.stroke_width(2))?;
                if entry.stroke == Stroke::LineWithPoints {
                    area.draw(&Circle::new((x + 12, middle), 3, entry.color.filled())).map_err(text_of)?;
                }
            }
        }
        let style = text(13.0, INK).at(HPos::Left, VPos::Center);
        area.draw_text(&entry.label, &style, (x + 32, middle)).map_err(text_of)?;
        x += width;
    }
    Ok(y + LEGEND_ROW_PX)
}

fn finite(points: &[(u64, f64)], keep: impl Fn(f64) -> bool) -> Vec<(f64, f64)> {
    let mut kept: Vec<_> =
        points.iter().filter(|p| p.1.is_finite() && keep(p.1)).map(|&(x, y)| (x as f64, y)).collect();
    kept.sort_by(|a, b| a.0.total_cmp(&b.0));
    kept
}

/// Mean over `window` points around each point, fewer at the ends.
fn running_mean(points: &[(f64, f64)], window: usize) -> Vec<(f64, f64)> {
    let half = window / 2;
    (0..points.len())
        .map(|i| {
            let near = &points[i.saturating_sub(half)..(i + half + 1).min(points.len())];
            (points[i].0, near.iter().map(|p| p.1 / near.len() as f64).sum())
        })
        .collect()
}

/// At most about [`POINTS_MAX`] of the points, the last one always among them.
fn thinned(points: &[(f64, f64)]) -> impl Iterator<Item = (f64, f64)> + '_ {
    let stride = points.len().div_ceil(POINTS_MAX).max(1);
    points.iter().enumerate().filter(move |(i, _)| i % stride == 0 || i + 1 == points.len()).map(|(_, p)| *p)
}

/// Values whose logarithms lie in the range: powers of ten, with 2 and 5 between them on a short range.
fn log_ticks((low, high): (f64, f64)) -> Vec<f64> {
    let decades = high - low;
    if decades < 0.4 {
        return linear_ticks((10_f64.powf(low), 10_f64.powf(high)), 5).into_iter().filter(|t| *t > 0.0).collect();
    }
    let factors: &[f64] = if decades <= 2.5 { &[1.0, 2.0, 5.0] } else { &[1.0] };
    let stride = (decades / 6.0).ceil().max(1.0) as usize;
    (low.floor() as i32..=high.ceil() as i32)
        .step_by(stride)
        .flat_map(|power| factors.iter().map(move |f| f * 10_f64.powi(power)))
        .filter(|t| (low..=high).contains(&t.log10()))
        .collect()
}

fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map(|c| c.to_uppercase().chain(chars).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A run as it might be: noisy KL falling ten-fold, accuracy rising.
    fn a_run() -> LearningCurve {
        let mut noise = 1_u64;
        let mut random = || {
            noise = noise.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (noise >> 33) as f64 / (1_u64 << 31) as f64
        };
        LearningCurve {
            title: "Countdown: on-policy distillation".into(),
            subtitle: "student 0.2 M parameters, teacher 1.7 M parameters, seed 1".into(),
            validation_name: "accuracy on held-out problems".into(),
            student: (0..=13).map(|i| (i * 10, 0.021 + 0.69 * (1.0 - (-(i as f64) / 4.0).exp()))).collect(),
            student_start: Some(0.021),
            teacher: Some(0.752),
            kl: (1..=130).map(|i| (i, 1.4 * (-(i as f64) / 45.0).exp() * (0.7 + 0.6 * random()) + 0.04)).collect(),
        }
    }

    #[test]
    fn the_picture_has_its_labels_and_lines() {
        let svg = a_run().to_svg().unwrap();
        for wanted in
            ["teacher 75.2 %", "student 2.1 % → 68.4 %", "training step", "nats per token (log)", "20 %", "0.1"]
        {
            assert!(svg.contains(wanted), "{wanted}");
        }
    }

    #[test]
    fn text_of_the_user_is_escaped() {
        let svg = LearningCurve { title: "<script>&\"".into(), ..a_run() }.to_svg().unwrap();
        assert!(svg.contains("&lt;script&gt;&amp;") && !svg.contains("<script>"));
    }

    #[test]
    fn a_curve_without_points_is_refused() {
        let empty = LearningCurve { teacher: Some(0.5), kl: vec![(1, 0.0)], student: vec![(0, f64::NAN)], ..a_run() };
        assert!(matches!(empty.to_svg(), Err(ReportError::NothingToPlot)));
    }

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(linear_ticks((0.0, 130.0), 8), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0, 120.0]);
        assert_eq!(log_ticks((-1.1, 0.4)), [0.1, 0.2, 0.5, 1.0, 2.0]);
        assert_eq!([0.1 + 0.2, 1e-7, 250.0].map(tick_text), ["0.3", "1e-7", "250"]);
    }

    proptest! {
        #[test]
        fn any_numbers_can_be_drawn(
            student in proptest::collection::vec((0..1u64 << 40, any::<f64>()), 0..40),
            kl in proptest::collection::vec((0..1u64 << 40, any::<f64>()), 0..40),
            teacher in proptest::option::of(any::<f64>()),
        ) {
            match (LearningCurve { student, kl, teacher, ..LearningCurve::default() }).to_svg() {
                Ok(svg) => prop_assert!(svg.contains("training step") && !svg.contains("NaN")),
                Err(error) => prop_assert!(matches!(error, ReportError::NothingToPlot)),
            }
        }
    }
}
