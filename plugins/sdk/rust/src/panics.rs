//! The text of a panic: WebAssembly loses it, the host sees a bare trap.

/// Sends the text of a panic to the host. Called before any code of the author.
pub fn install_hook() {
    #[cfg(all(target_arch = "wasm32", any(feature = "log", feature = "stderr")))]
    std::panic::set_hook(Box::new(|info| {
        // One line: the last one is what the host takes for the reason.
        let text = info.to_string().replace('\n', " ");
        #[cfg(feature = "log")]
        crate::host::log::write(crate::host::log::Level::Error, &text);
        #[cfg(not(feature = "log"))]
        write_to_stderr(&text);
    }));
}

#[cfg(all(target_arch = "wasm32", feature = "stderr", not(feature = "log")))]
fn write_to_stderr(text: &str) {
    /// WASI takes 4096 in one call.
    const BYTES_MAX: usize = 4000;
    let cut = text.len().min(BYTES_MAX);
    let line = [&text.as_bytes()[..cut], b"\n"].concat();
    let stream = crate::bindings::wasi::cli::stderr::get_stderr();
    // The trap follows whether or not anybody could be told.
    let _ = stream.blocking_write_and_flush(&line);
}
