//! Why a command did not do what was asked, and with which code the process ends.

use std::error::Error;
use std::fmt;
use std::process::ExitCode;

use cosmos_author::AuthorError;
use cosmos_config::{ConfigError, ConfigErrors, Problem, Severity};
use cosmos_control::ControlError;
use cosmos_launch::LaunchError;
use cosmos_plugin::PluginError;
use cosmos_run::RunError;

/// How a command ended when nothing is left to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// All done.
    Done,
    /// The run or a check failed.
    Failed,
    /// Wrong usage or config; nothing was written.
    Usage,
    /// Saved; start the same command again with `--resume` (sysexits' EX_TEMPFAIL, which Slurm scripts requeue on).
    Requeue,
}

impl Exit {
    /// The process's exit code.
    pub fn code(self) -> ExitCode {
        ExitCode::from(match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Requeue => 75,
        })
    }
}

/// Where in a file something is wrong.
#[derive(Debug, Clone)]
pub struct Place {
    /// The place in words, as `file:line:column`.
    pub name: String,
    /// The source line and the part of it to mark.
    pub excerpt: Option<Excerpt>,
}

/// A source line.
#[derive(Debug, Clone)]
pub struct Excerpt {
    /// Counted from 1.
    pub line: usize,
    /// In characters, counted from 1.
    pub column: usize,
    /// Characters to mark.
    pub width: usize,
    /// The line.
    pub text: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// One thing to tell the user.
#[derive(Debug, Default)]
pub struct Notice {
    /// Whether it does not stop anything.
    pub is_warning: bool,
    /// What is wrong.
    pub message: String,
    /// Why, from the nearest cause to the first.
    pub causes: Vec<String>,
    /// Where.
    pub place: Option<Place>,
    /// How to mend it.
    pub hint: Option<String>,
}

impl Notice {
    /// A problem of a config file whose text is at hand.
    pub fn of_config(problem: &Problem, text: &str) -> Self {
        let place = problem.place.as_ref().map(|place| {
            let line = place.line.checked_sub(1).and_then(|above| text.lines().nth(above));
            // A value of several lines is marked on its first.
            let value = text.get(place.span.clone()).unwrap_or_default().lines().next().unwrap_or_default();
            let excerpt = line.map(|line| Excerpt {
                line: place.line,
                column: place.column,
                width: value.chars().count(),
                text: line.to_owned(),
            });
            Place { name: place.to_string(), excerpt }
        });
        Self {
            is_warning: problem.severity == Severity::Warning,
            message: problem.message.clone(),
            causes: Vec::new(),
            place,
            hint: problem.hint.clone(),
        }
    }
}

/// A failure ready to be shown.
#[derive(Debug)]
pub struct Failure {
    exit: Exit,
    notices: Vec<Notice>,
}

impl Failure {
    /// Wrong usage or config: exit 2.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::of(Exit::Usage, Notice { message: message.into(), ..Notice::default() })
    }

    /// The work itself failed: exit 1.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::of(Exit::Failed, Notice { message: message.into(), ..Notice::default() })
    }

    fn of(exit: Exit, notice: Notice) -> Self {
        Self { exit, notices: vec![notice] }
    }

    /// An error of a crate below, with its causes.
    pub fn from_error(exit: Exit, error: &dyn Error, hint: Option<String>) -> Self {
        let message = error.to_string();
        let mut causes: Vec<String> = Vec::new();
        let mut source = error.source();
        while let Some(cause) = source {
            let text = cause.to_string();
            // Messages that already quote their cause need not say it twice.
            if !message.contains(&text) && !causes.iter().any(|c| c.contains(&text)) {
                causes.push(text);
            }
            source = cause.source();
        }
        Self::of(exit, Notice { message, causes, hint, ..Notice::default() })
    }

    /// Standard output could not be written. A reader that has gone away (`| head`) is no failure.
    pub fn stdout(error: std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            return Self { exit: Exit::Done, notices: Vec::new() };
        }
        Self::failed(format!("cannot write to standard output: {error}"))
    }

    /// Adds the fix to the last notice.
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        if let Some(notice) = self.notices.last_mut() {
            notice.hint = Some(hint.into());
        }
        self
    }

    /// Puts the place, such as `file:line`, before the message.
    pub fn at(mut self, place: &str) -> Self {
        if let Some(notice) = self.notices.last_mut() {
            notice.message = format!("{place}: {}", notice.message);
        }
        self
    }

    /// How the process ends.
    pub fn exit(&self) -> Exit {
        self.exit
    }

    /// What there is to tell; nothing when nobody listens any more.
    pub fn notices(&self) -> &[Notice] {
        &self.notices
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        match error {
            ConfigError::Invalid(errors) => errors.into(),
            other => Self::from_error(Exit::Usage, &other, other.hint()),
        }
    }
}

impl From<ConfigErrors> for Failure {
    fn from(errors: ConfigErrors) -> Self {
        let notices = errors.problems.iter().map(|p| Notice::of_config(p, &errors.text)).collect();
        Self { exit: Exit::Usage, notices }
    }
}

impl From<PluginError> for Failure {
    fn from(error: PluginError) -> Self {
        let hint = error.hint().map(|h| h.to_string());
        Self::from_error(Exit::Usage, &error, hint)
    }
}

impl From<AuthorError> for Failure {
    fn from(error: AuthorError) -> Self {
        let exit = if error.is_usage() { Exit::Usage } else { Exit::Failed };
        Self::from_error(exit, &error, error.hint())
    }
}

impl From<ControlError> for Failure {
    fn from(error: ControlError) -> Self {
        let exit = if error.is_usage() { Exit::Usage } else { Exit::Failed };
        Self::from_error(exit, &error, error.hint())
    }
}

impl From<LaunchError> for Failure {
    fn from(error: LaunchError) -> Self {
        let exit = if error.is_usage() { Exit::Usage } else { Exit::Failed };
        Self::from_error(exit, &error, error.hint())
    }
}

impl From<RunError> for Failure {
    fn from(error: RunError) -> Self {
        let exit = if error.is_usage() { Exit::Usage } else { Exit::Failed };
        Self::from_error(exit, &error, error.hint())
    }
}

impl Failure {
    /// An error of a run, with the config's source line where the error names one.
    pub fn from_run(error: RunError, text: &str) -> Self {
        match &error {
            RunError::Config { place, message, hint } if !place.is_empty() => {
                let name = place.trim_end().trim_end_matches(':').to_owned();
                let excerpt = Excerpt::find(&name, text);
                let hint = (!hint.is_empty()).then(|| hint.clone());
                let place = Some(Place { name, excerpt });
                Self::of(Exit::Usage, Notice { message: message.clone(), place, hint, ..Notice::default() })
            }
            _ => error.into(),
        }
    }
}

impl Excerpt {
    /// The line that `file:line:column` names; marked from the column to the end of what stands there.
    fn find(place: &str, text: &str) -> Option<Self> {
        let mut parts = place.rsplitn(3, ':');
        let column: usize = parts.next()?.parse().ok()?;
        let line: usize = parts.next()?.parse().ok()?;
        let source = text.lines().nth(line.checked_sub(1)?)?;
        let value: String = source.chars().skip(column.checked_sub(1)?).collect();
        let value = value.split(" #").next().unwrap_or_default().trim_end();
        Some(Self { line, column, width: value.chars().count(), text: source.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_pipe_is_quiet_success() {
        let failure = Failure::stdout(std::io::Error::from(std::io::ErrorKind::BrokenPipe));
        assert!(failure.notices().is_empty());
        assert_eq!(failure.exit(), Exit::Done);
        assert_eq!(Failure::stdout(std::io::Error::other("full")).exit(), Exit::Failed);
    }

    #[test]
    fn causes_are_not_said_twice() {
        #[derive(Debug, thiserror::Error)]
        #[error("a.toml: {source}")]
        struct Outer {
            source: std::io::Error,
        }
        let outer = Outer { source: std::io::Error::other("disk full") };
        assert!(Failure::from_error(Exit::Failed, &outer, None).notices()[0].causes.is_empty());
    }
}
