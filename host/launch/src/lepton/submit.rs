//! Lepton's HTTP API, as far as a job is submitted.

use std::fmt;
use std::time::Duration;

use serde_json::Value;

use crate::error::{LaunchError, Result};

/// The workspace's URL, such as `https://gateway.dgxc-lepton.nvidia.com/api/v2/workspaces/ID`. The names are Lepton's own.
pub const URL_VARIABLE: &str = "LEPTON_WORKSPACE_URL";
/// A token of the workspace.
pub const TOKEN_VARIABLE: &str = "LEPTON_WORKSPACE_TOKEN";
const TIMEOUT: Duration = Duration::from_secs(120);
const ANSWER_BYTES_MAX: u64 = 4 << 20;
const SHOWN_CHARS_MAX: usize = 1000;

/// Where jobs go. Its token is not shown by `{:?}`.
#[derive(Clone)]
pub struct Workspace {
    url: String,
    token: String,
}

impl fmt::Debug for Workspace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workspace").field("url", &self.url).finish_non_exhaustive()
    }
}

impl Workspace {
    /// From the variables that Lepton's own tool reads.
    pub fn from_environment(environment: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let need = |name: &str| {
            environment(name).map(|v| v.trim().to_owned()).filter(|value| !value.is_empty()).ok_or_else(|| {
                LaunchError::usage(
                    format!("{name} is not set"),
                    format!("set {URL_VARIABLE} and {TOKEN_VARIABLE} (in the dashboard: Settings, Tokens), or print the job by `--dry-run`"),
                )
            })
        };
        let (url, token) = (need(URL_VARIABLE)?.trim_end_matches('/').to_owned(), need(TOKEN_VARIABLE)?);
        let local = ["http://127.0.0.1:", "http://localhost:"].iter().any(|start| url.starts_with(start));
        if !url.starts_with("https://") && !local {
            return Err(LaunchError::usage(format!("{URL_VARIABLE} is `{url}`, and a token goes over https only"), ""));
        }
        if !token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(LaunchError::usage(format!("{TOKEN_VARIABLE} has characters that a header cannot carry"), ""));
        }
        Ok(Self { url, token })
    }
}

/// Submits a job. Gives its id.
pub fn submit(workspace: &Workspace, job: &Value) -> Result<String> {
    let agent: ureq::Agent =
        ureq::Agent::config_builder().timeout_global(Some(TIMEOUT)).http_status_as_error(false).build().into();
    let url = format!("{}/jobs", workspace.url);
    let refused = |answer: String, hint: &str| LaunchError::Refused { who: url.clone(), answer, hint: hint.into() };
    let body = job.to_string();
    let mut request = agent
        .post(&url)
        .header("Authorization", format!("Bearer {}", workspace.token))
        .header("Content-Type", "application/json");
    if let Some(origin) = origin(&workspace.url) {
        request = request.header("Origin", origin);
    }
    let mut response = request
        .send(body.as_bytes())
        .map_err(|e| refused(e.to_string(), &format!("is {URL_VARIABLE} right, and can this machine reach it?")))?;
    let status = response.status().as_u16();
    let text = response.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_string().map_err(|e| {
        refused(
            format!("status {status}, and its answer could not be read: {e}"),
            "look in the dashboard whether the job is there",
        )
    })?;
    let shown = || text.trim().chars().take(SHOWN_CHARS_MAX).collect::<String>();
    if !(200..300).contains(&status) {
        let hint = match status {
            401 | 403 => format!("make a new token and set {TOKEN_VARIABLE}"),
            404 => format!("{URL_VARIABLE} must end with `/api/v2/workspaces/ID`"),
            409 => "a job of this name is there: choose another `--lepton-job-name`".into(),
            _ => "`--dry-run` prints what was sent".into(),
        };
        return Err(refused(format!("status {status}: {}", shown()), &hint));
    }
    let answer: Value = serde_json::from_str(&text).map_err(|_| {
        refused(
            format!("status {status}, and no JSON: {}", shown()),
            &format!("is {URL_VARIABLE} the API's and not the dashboard's?"),
        )
    })?;
    let id = answer["metadata"]["id"].as_str().or(answer["metadata"]["name"].as_str());
    id.map(str::to_owned).ok_or_else(|| {
        refused(format!("no id in its answer: {}", shown()), "look in the dashboard whether the job is there")
    })
}

/// Scheme and host, which the gateway wants to see.
fn origin(url: &str) -> Option<&str> {
    let host = url.find("://")? + 3;
    Some(url[host..].find('/').map_or(url, |end| &url[..host + end]))
}
