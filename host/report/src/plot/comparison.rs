//! Several runs towards one level: how far each is after so many steps, and after so many seconds.

use std::path::Path;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};
use serde::Serialize;

use super::canvas::{Area, dashed, extent, line, linear_ticks, shortened, text, text_of, tick_text};
use crate::folder::replace_file;
use crate::format::format_percent;
use crate::{ReportError, Result};

const WIDTH_PX: u32 = 960;
const HEIGHT_PX: u32 = 440;
const MARGIN_PX: i32 = 24;
const LEGEND_TOP_PX: i32 = 66;
const LEGEND_ROW_PX: i32 = 22;
const PANELS_TOP_PX: i32 = 100;
const PANEL_LEFT_PX: i32 = 56;
const PANEL_RIGHT_PX: i32 = 16;
const PANEL_BOTTOM_PX: i32 = 52;

/// Colours for a light or a dark page. The picture has no background of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Theme {
    /// Dark on light.
    Light,
    /// Light on dark.
    Dark,
}

struct Colours {
    ink: RGBColor,
    quiet_ink: RGBColor,
    grid: RGBColor,
    axis: RGBColor,
    level: RGBColor,
    runs: [RGBColor; 4],
}

impl Theme {
    fn colours(self) -> Colours {
        match self {
            Self::Light => Colours {
                ink: RGBColor(31, 41, 55),
                quiet_ink: RGBColor(107, 114, 128),
                grid: RGBColor(229, 231, 235),
                axis: RGBColor(156, 163, 175),
                level: RGBColor(202, 110, 6),
                runs: [RGBColor(29, 78, 216), RGBColor(15, 118, 110), RGBColor(190, 24, 93), RGBColor(109, 40, 217)],
            },
            Self::Dark => Colours {
                ink: RGBColor(230, 237, 243),
                quiet_ink: RGBColor(145, 152, 161),
                grid: RGBColor(48, 54, 61),
                axis: RGBColor(101, 108, 118),
                level: RGBColor(245, 166, 35),
                runs: [
                    RGBColor(96, 165, 250),
                    RGBColor(45, 212, 191),
                    RGBColor(244, 114, 182),
                    RGBColor(167, 139, 250),
                ],
            },
        }
    }
}

/// One run of a [`Comparison`].
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct ComparedRun {
    /// What was done.
    pub name: String,
    /// (steps, seconds, share of problems answered right), ascending.
    pub points: Vec<(u64, f64, f64)>,
}

impl ComparedRun {
    /// Steps and seconds at the first point that is at `level` or above.
    pub fn reaches(&self, level: f64) -> Option<(u64, f64)> {
        self.points.iter().find(|p| p.2 >= level).map(|p| (p.0, p.1))
    }
}

/// Runs side by side: the left panel by steps, the right one by seconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Comparison {
    /// Headline.
    pub title: String,
    /// A second line, such as the machine.
    pub subtitle: String,
    /// What all runs aim at, and its share of problems answered right.
    pub level: (String, f64),
    /// Name of the left axis, such as `steps of 256 completions`.
    pub steps_name: String,
    /// Name of the right axis, such as `seconds on two cores`.
    pub seconds_name: String,
    /// At most four.
    pub runs: Vec<ComparedRun>,
}

impl Comparison {
    /// Draws it as SVG and writes it to `path`, replacing what is there.
    ///
    /// # Errors
    /// [`ReportError::NothingToPlot`], [`ReportError::CannotWrite`].
    pub fn write(&self, path: &Path, theme: Theme) -> Result<()> {
        replace_file(path, self.to_svg(theme)?.as_bytes())
    }

    /// The picture as an SVG document.
    ///
    /// # Errors
    /// [`ReportError::NothingToPlot`] without a run, with more than four, or with a number that is not finite.
    pub fn to_svg(&self, theme: Theme) -> Result<String> {
        let colours = theme.colours();
        let numbers = || self.runs.iter().flat_map(|r| &r.points).flat_map(|p| [p.1, p.2]).chain([self.level.1]);
        let filled = !self.runs.is_empty() && self.runs.iter().all(|r| !r.points.is_empty());
        if !filled || self.runs.len() > colours.runs.len() || !numbers().all(f64::is_finite) {
            return Err(ReportError::NothingToPlot);
        }
        let mut svg = String::new();
        {
            let area = SVGBackend::with_string(&mut svg, (WIDTH_PX, HEIGHT_PX)).into_drawing_area();
            self.draw(&area, &colours).map_err(|reason| ReportError::Plot { reason })?;
        }
        Ok(svg)
    }

    fn draw(&self, area: &Area, colours: &Colours) -> std::result::Result<(), String> {
        let room = |size_px: f64| (f64::from(WIDTH_PX as i32 - 2 * MARGIN_PX) / (0.56 * size_px)) as usize;
        let title = shortened(&self.title, room(20.0));
        area.draw_text(&title, &text(20.0, colours.ink).bold(), (MARGIN_PX, 14)).map_err(text_of)?;
        let subtitle = shortened(&self.subtitle, room(13.0));
        area.draw_text(&subtitle, &text(13.0, colours.quiet_ink).plain(), (MARGIN_PX, 41)).map_err(text_of)?;
        self.draw_legend(area, colours)?;
        let (_, panels) = area.split_vertically(PANELS_TOP_PX as u32);
        let (left, right) = panels.split_horizontally(WIDTH_PX / 2);
        self.draw_panel(&left, colours, &self.steps_name, |p| p.0 as f64)?;
        self.draw_panel(&right, colours, &self.seconds_name, |p| p.1)?;
        area.present().map_err(text_of)
    }

    fn draw_legend(&self, area: &Area, colours: &Colours) -> std::result::Result<(), String> {
        let (mut x, middle) = (MARGIN_PX, LEGEND_TOP_PX + LEGEND_ROW_PX / 2);
        let last = |run: &ComparedRun| run.points.last().map(|p| format_percent(p.2)).unwrap_or_default();
        let label = |run: &ComparedRun| format!("{} {}", run.name, last(run));
        let runs = self.runs.iter().zip(colours.runs).map(|(run, colour)| (label(run), colour, false));
        let level = (format!("{} {}", self.level.0, format_percent(self.level.1)), colours.level, true);
        for (label, colour, is_level) in runs.chain([level]) {
            if is_level {
                dashed(area, x, x + 24, middle, colour)?;
            } else {
                line(area, vec![(x, middle), (x + 24, middle)], colour.stroke_width(3))?;
            }
            let style = text(13.0, colours.ink).at(HPos::Left, VPos::Center);
            area.draw_text(&label, &style, (x + 31, middle)).map_err(text_of)?;
            x += 31 + (label.chars().count() as f64 * 13.0 * 0.56) as i32 + 20;
        }
        Ok(())
    }

    fn draw_panel(
        &self,
        area: &Area,
        colours: &Colours,
        x_name: &str,
        x_of: impl Fn(&(u64, f64, f64)) -> f64,
    ) -> std::result::Result<(), String> {
        let (width, height) = (area.dim_in_pixel().0 as i32, area.dim_in_pixel().1 as i32);
        let (left, right, top, bottom) = (PANEL_LEFT_PX, width - PANEL_RIGHT_PX, 10, height - PANEL_BOTTOM_PX);
        let points = || self.runs.iter().flat_map(|run| &run.points);
        let x_last = extent(points().map(&x_of)).1.max(1.0);
        let x_px = |x: f64| left + (x / x_last * f64::from(right - left)).round() as i32;
        let highest = extent(points().map(|p| p.2).chain([self.level.1])).1;
        let y_range = (0.0, (highest * 1.04 * 20.0).ceil().clamp(1.0, 20.0) / 20.0);
        let y_px = |y: f64| bottom - (y / y_range.1 * f64::from(bottom - top)).round() as i32;

        for value in linear_ticks(y_range, 6) {
            let y = y_px(value);
            line(area, vec![(left, y), (right, y)], colours.grid.stroke_width(1))?;
            let style = text(12.0, colours.quiet_ink).at(HPos::Right, VPos::Center);
            let label = format!("{} %", tick_text((value * 1000.0).round() / 10.0));
            area.draw_text(&label, &style, (left - 8, y)).map_err(text_of)?;
        }
        for value in linear_ticks((0.0, x_last), 6) {
            line(area, vec![(x_px(value), bottom), (x_px(value), bottom + 5)], colours.axis.stroke_width(1))?;
            let style = text(12.0, colours.quiet_ink).at(HPos::Center, VPos::Top);
            area.draw_text(&tick_text(value), &style, (x_px(value), bottom + 8)).map_err(text_of)?;
        }
        line(area, vec![(left, bottom), (right, bottom)], colours.axis.stroke_width(1))?;
        let style = text(12.0, colours.ink).at(HPos::Center, VPos::Top);
        area.draw_text(&shortened(x_name, 60), &style, ((left + right) / 2, bottom + 27)).map_err(text_of)?;

        dashed(area, left, right, y_px(self.level.1), colours.level)?;
        // The first run lies on top.
        for (run, colour) in self.runs.iter().zip(colours.runs).rev() {
            let points: Vec<_> = run.points.iter().map(|p| (x_px(x_of(p)), y_px(p.2))).collect();
            if let Some(last) = points.last().copied() {
                line(area, points, colour.stroke_width(3))?;
                area.draw(&Circle::new(last, 4, colour.filled())).map_err(text_of)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn compared() -> Comparison {
        let run = |name: &str, speed: f64| ComparedRun {
            name: name.into(),
            points: (0..=16)
                .map(|i| (i * 25, i as f64 * 6.0, 0.12 + 0.82 * (1.0 - (-(i as f64) * speed).exp())))
                .collect(),
        };
        Comparison {
            title: "Countdown".into(),
            subtitle: "two cores".into(),
            level: ("teacher".into(), 0.951),
            steps_name: "steps".into(),
            seconds_name: "seconds".into(),
            runs: vec![run("distillation", 0.4), run("SFT", 0.2), run("GRPO", 0.05)],
        }
    }

    #[test]
    fn the_picture_names_runs_and_level_in_both_themes() {
        let (light, dark) = (compared().to_svg(Theme::Light).unwrap(), compared().to_svg(Theme::Dark).unwrap());
        for svg in [&light, &dark] {
            for wanted in ["distillation 93.9 %", "GRPO", "teacher 95.1 %", "100 %", "400", "seconds"] {
                assert!(svg.contains(wanted), "{wanted}");
            }
        }
        assert_ne!(light, dark);
    }

    #[test]
    fn the_level_is_reached_at_the_first_point_above_it() {
        let run = ComparedRun { name: String::new(), points: vec![(0, 1.0, 0.1), (5, 2.5, 0.6), (9, 3.0, 0.5)] };
        assert_eq!(run.reaches(0.5), Some((5, 2.5)));
        assert_eq!(run.reaches(0.61), None);
    }

    #[test]
    fn nothing_to_plot_is_refused() {
        let none = Comparison { runs: Vec::new(), ..compared() };
        let empty = Comparison { runs: vec![ComparedRun::default()], ..compared() };
        let broken = Comparison { level: ("teacher".into(), f64::NAN), ..compared() };
        let many = Comparison { runs: vec![compared().runs[0].clone(); 5], ..compared() };
        for comparison in [none, empty, broken, many] {
            assert!(matches!(comparison.to_svg(Theme::Light), Err(ReportError::NothingToPlot)));
        }
    }

    proptest! {
        #[test]
        fn any_shares_can_be_drawn(
            points in proptest::collection::vec((0..1u64 << 40, 0.0..1e9f64, 0.0..=1.0f64), 1..40),
            level in 0.0..=1.0f64,
        ) {
            let run = ComparedRun { name: "any".into(), points };
            let comparison = Comparison { level: ("level".into(), level), runs: vec![run], ..compared() };
            prop_assert!(!comparison.to_svg(Theme::Dark).unwrap().contains("NaN"));
        }
    }
}
