//! A serial line, raw.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use nix::fcntl::OFlag;
use nix::sys::termios::{self, BaudRate, ControlFlags, FlushArg, SetArg};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// How a line is spoken on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// `/dev/ttyUSB0`.
    pub path: String,
    /// Bits per second.
    pub baud: u32,
    /// 7 or 8.
    pub data_bits: u8,
    /// None, even or odd.
    pub parity: Parity,
    /// 1 or 2.
    pub stop_bits: u8,
}

/// The bit that makes a character's ones even or odd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parity {
    /// There is none.
    None,
    /// Even.
    Even,
    /// Odd.
    Odd,
}

/// Speeds that lines have.
const SPEEDS: [(u32, BaudRate); 11] = [
    (1200, BaudRate::B1200),
    (2400, BaudRate::B2400),
    (4800, BaudRate::B4800),
    (9600, BaudRate::B9600),
    (19_200, BaudRate::B19200),
    (38_400, BaudRate::B38400),
    (57_600, BaudRate::B57600),
    (115_200, BaudRate::B115200),
    (230_400, BaudRate::B230400),
    (460_800, BaudRate::B460800),
    (921_600, BaudRate::B921600),
];

/// Whether a line can have this speed.
#[must_use]
pub fn is_speed(baud: u32) -> bool {
    SPEEDS.iter().any(|(speed, _)| *speed == baud)
}

/// An open line.
#[derive(Debug)]
pub struct Tty(AsyncFd<File>);

impl Tty {
    /// Opens and sets up a line.
    ///
    /// # Errors
    ///
    /// When it is not there, is no serial line, or cannot be set up like that.
    pub fn open(settings: &Settings) -> io::Result<Self> {
        let flags = OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags.bits()).open(&settings.path)?;
        let mut line = termios::tcgetattr(&file)?;
        termios::cfmakeraw(&mut line);
        line.control_flags |= ControlFlags::CREAD | ControlFlags::CLOCAL;
        line.control_flags
            .remove(ControlFlags::CSIZE | ControlFlags::PARENB | ControlFlags::PARODD | ControlFlags::CSTOPB);
        line.control_flags |= if settings.data_bits == 7 { ControlFlags::CS7 } else { ControlFlags::CS8 };
        line.control_flags |= match settings.parity {
            Parity::None => ControlFlags::empty(),
            Parity::Even => ControlFlags::PARENB,
            Parity::Odd => ControlFlags::PARENB | ControlFlags::PARODD,
        };
        if settings.stop_bits == 2 {
            line.control_flags |= ControlFlags::CSTOPB;
        }
        let speed = SPEEDS.iter().find(|(baud, _)| *baud == settings.baud);
        let (_, speed) = speed.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no line has this speed"))?;
        termios::cfsetspeed(&mut line, *speed)?;
        termios::tcsetattr(&file, SetArg::TCSANOW, &line)?;
        termios::tcflush(&file, FlushArg::TCIOFLUSH)?;
        Ok(Self(register(file)?))
    }
}

#[expect(unsafe_code, reason = "AsyncFd takes only promises")]
fn register(file: File) -> io::Result<AsyncFd<File>> {
    // SAFETY: a File owns its descriptor, which stays open and the same for as long as the File lives, and the AsyncFd keeps the File.
    unsafe { AsyncFd::register(file) }.map_err(Into::into)
}

impl AsyncRead for Tty {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.0.poll_read_ready(cx))?;
            let space = buf.initialize_unfilled();
            if let Ok(read) = ready.try_io(|line| line.get_ref().read(space)) {
                let length = read?;
                buf.advance(length);
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl AsyncWrite for Tty {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.0.poll_write_ready(cx))?;
            if let Ok(written) = ready.try_io(|line| line.get_ref().write(bytes)) {
                return Poll::Ready(written);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
