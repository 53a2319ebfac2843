//! HTTP requests to questions for the supervisor, and back.

use std::sync::mpsc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{Method, StatusCode, header};
use axum::response::Response;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::listener::Taken;
use crate::supervisor::{Answer, Ask, Reply};
use crate::token::Token;
use crate::wire::{BODY_BYTES_MAX, Refusal};

/// What every request is handled with.
#[derive(Clone)]
pub(crate) struct Door {
    pub token: Token,
    pub asks: mpsc::Sender<Ask>,
    pub request_ms_max: u64,
    /// Longest time until an answer, long polls included.
    pub answer_ms_max: u64,
}

/// The one route: whoever has no token does not even learn which paths there are.
pub(crate) fn router(door: Door) -> Router {
    Router::new().fallback(handle).with_state(door)
}

async fn handle(State(door): State<Door>, ConnectInfo(taken): ConnectInfo<Taken>, request: Request) -> Response {
    let answer = answer(&door, &taken, request).await;
    let (status, body) = match answer {
        Ok(value) => (200, value.to_string()),
        Err(refusal) if refusal.status == 401 => (401, String::new()),
        Err(refusal) => (refusal.status, serde_json::to_string(&refusal).unwrap_or_default()),
    };
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    // One connection, one request: deadlines are those of the connection.
    headers.insert(header::CONNECTION, header::HeaderValue::from_static("close"));
    response
}

async fn answer(door: &Door, taken: &Taken, request: Request) -> Answer {
    let (parts, body) = request.into_parts();
    let (method, path) = (parts.method, parts.uri.path());
    if method == Method::GET && path == "/health" {
        taken.set();
        return Ok(json!({"ok": true}));
    }
    let offered = parts.headers.get(header::AUTHORIZATION).map(|v| v.as_bytes()).unwrap_or_default();
    if !door.token.admits(offered.strip_prefix(b"Bearer ").unwrap_or_default()) {
        return Err(Refusal::new(401, "token", ""));
    }
    let length = parts.headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    let too_large = || Refusal::new(413, "size", format!("a body of more than {BODY_BYTES_MAX} bytes"));
    if length.is_some_and(|length| length > BODY_BYTES_MAX as u64) {
        return Err(too_large());
    }
    let reading = tokio::time::timeout(Duration::from_millis(door.request_ms_max), to_bytes(body, BODY_BYTES_MAX));
    let bytes = match reading.await {
        Err(_) => return Err(Refusal::new(408, "slow", format!("no request within {} ms", door.request_ms_max))),
        Ok(Err(error)) => {
            let text = error.to_string();
            return Err(if text.contains("limit") { too_large() } else { Refusal::request(text) });
        }
        Ok(Ok(bytes)) => bytes,
    };
    taken.set();
    match (method, path) {
        (Method::GET, "/status") => door.ask(Ask::Status).await,
        (Method::POST, "/v1/snapshot") => door.ask(Ask::Snapshot).await,
        (Method::POST, "/v1/join") => door.asked(&bytes, Ask::Join).await,
        (Method::POST, "/v1/next") => door.asked(&bytes, Ask::Next).await,
        (Method::POST, "/v1/beat") => door.asked(&bytes, Ask::Beat).await,
        (Method::POST, "/v1/done") => door.asked(&bytes, Ask::Done).await,
        (Method::POST, "/v1/failed") => door.asked(&bytes, Ask::Failed).await,
        (Method::POST, "/v1/leave") => door.asked(&bytes, Ask::Leave).await,
        _ => Err(Refusal::new(404, "path", "there is no such path")),
    }
}

impl Door {
    async fn asked<T: DeserializeOwned>(&self, bytes: &[u8], ask: impl FnOnce(T, Reply) -> Ask) -> Answer {
        let question: T =
            serde_json::from_slice(bytes).map_err(|e| Refusal::request(format!("the body is not understood: {e}")))?;
        self.ask(|reply| ask(question, reply)).await
    }

    async fn ask(&self, ask: impl FnOnce(Reply) -> Ask) -> Answer {
        let (reply, answer) = oneshot::channel::<Result<Value, Refusal>>();
        let stopping = || Refusal::new(503, "stopping", "the controller is stopping");
        self.asks.send(ask(reply)).map_err(|_| stopping())?;
        match tokio::time::timeout(Duration::from_millis(self.answer_ms_max), answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(stopping()),
            Err(_) => Err(Refusal::new(503, "busy", "the controller is too busy to answer")),
        }
    }
}
