//! The terminal that a command is typed at: raw while a session lasts, and its size.

use std::io::{self, IsTerminal as _, Read as _, Stdin};

use bytes::Bytes;
use nix::libc;
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::spdy::MAX_DATA;
use crate::supervise;

/// Columns and rows.
pub(super) type Size = (u16, u16);

/// A terminal that hands on every key as it is; it is as before when this is dropped.
pub(super) struct Raw {
    stdin: Stdin,
    before: Termios,
}

impl Raw {
    pub(super) fn new() -> io::Result<Self> {
        let stdin = io::stdin();
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&stdin, SetArg::TCSANOW, &raw)?;
        Ok(Self { stdin, before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // There is nothing else to be done about it.
        let _ = tcsetattr(&self.stdin, SetArg::TCSANOW, &self.before);
    }
}

/// Waits until somebody has the process end, by SIGTERM or SIGHUP (the terminal is gone). Says by which, and from now on it is who waits
/// here who has to end it.
pub(super) async fn told_to_end() -> io::Result<SignalKind> {
    let (mut terminate, mut hang_up) = (signal(SignalKind::terminate())?, signal(SignalKind::hangup())?);
    Ok(tokio::select! {
        _ = terminate.recv() => SignalKind::terminate(),
        _ = hang_up.recv() => SignalKind::hangup(),
    })
}

/// Whether somebody types.
pub(super) fn is_typed_at() -> bool {
    io::stdin().is_terminal()
}

/// The size now, and whenever it has changed.
pub(super) fn sizes() -> io::Result<mpsc::Receiver<Size>> {
    let mut changes = signal(SignalKind::window_change())?;
    let (sender, receiver) = mpsc::channel(1);
    supervise::spawn("terminal size", async move {
        loop {
            if let Some(size) = size()
                && sender.send(size).await.is_err()
            {
                return;
            }
            if changes.recv().await.is_none() {
                return;
            }
        }
    });
    Ok(receiver)
}

#[expect(unsafe_code, reason = "TIOCGWINSZ")]
fn size() -> Option<Size> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the request writes a winsize to the pointer, which is to one that lives until after the call.
    let done = unsafe { libc::ioctl(libc::STDIN_FILENO, libc::TIOCGWINSZ, &raw mut size) };
    (done == 0 && size.ws_col > 0).then_some((size.ws_col, size.ws_row))
}

/// What is typed or piped in. The thread that reads it is not waited for at the end: nobody can make it stop.
pub(super) fn input() -> io::Result<mpsc::Receiver<Bytes>> {
    let (sender, receiver) = mpsc::channel(2);
    std::thread::Builder::new().name("stdin".to_owned()).spawn(move || {
        let mut stdin = io::stdin().lock();
        let mut buffer = vec![0; MAX_DATA];
        loop {
            match stdin.read(&mut buffer) {
                Ok(0) => return,
                Ok(read) => {
                    if sender.blocking_send(Bytes::copy_from_slice(&buffer[..read])).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    })?;
    Ok(receiver)
}
