//! Connections with a bound on their number and on how long each may take.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};

/// A listener that holds at most so many connections; further ones wait in the system's queue.
pub(crate) struct Bounded {
    pub listener: TcpListener,
    pub permits: Arc<Semaphore>,
    /// From the connection to the last byte of the request.
    pub request_ms_max: u64,
    /// From the connection to the last byte of the answer.
    pub connection_ms_max: u64,
}

impl Listener for Bounded {
    type Io = Guarded;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let Ok(permit) = Arc::clone(&self.permits).acquire_owned().await else {
                // The semaphore is never closed; without it there is nothing to accept with.
                std::future::pending::<()>().await;
                continue;
            };
            match self.listener.accept().await {
                Ok((stream, address)) => {
                    let _ = stream.set_nodelay(true);
                    let now = Instant::now();
                    let request_until = now + Duration::from_millis(self.request_ms_max);
                    let guarded = Guarded {
                        stream,
                        taken: Taken::default(),
                        timer: Box::pin(tokio::time::sleep_until(request_until)),
                        until: now + Duration::from_millis(self.connection_ms_max),
                        _permit: permit,
                    };
                    return (guarded, address);
                }
                Err(error) => {
                    tracing::debug!("cannot accept a connection: {error}");
                    // Too many open files, mostly: others have to end first.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// Set by the handler once it has the whole request: from there on the longer deadline counts.
#[derive(Clone, Default)]
pub(crate) struct Taken(Arc<AtomicBool>);

impl Taken {
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Connected<IncomingStream<'_, Bounded>> for Taken {
    fn connect_info(stream: IncomingStream<'_, Bounded>) -> Self {
        stream.io().taken.clone()
    }
}

/// A connection that ends when its time is up, however slowly it still moves.
pub(crate) struct Guarded {
    stream: TcpStream,
    taken: Taken,
    timer: Pin<Box<Sleep>>,
    until: Instant,
    _permit: OwnedSemaphorePermit,
}

impl Guarded {
    fn in_time(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        while self.timer.as_mut().poll(context).is_ready() {
            if !self.taken.0.load(Ordering::Relaxed) || Instant::now() >= self.until {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let until = self.until;
            self.timer.as_mut().reset(until);
        }
        Ok(())
    }
}

impl AsyncRead for Guarded {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.in_time(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.in_time(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
