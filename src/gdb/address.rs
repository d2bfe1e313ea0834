//! Where a server listens: TCP, a Unix socket, or standard input and output; and the connection to one client.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// An address as a user writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `HOST:PORT`, `:PORT` or `PORT`; without a host, loopback. Port 0 is any free one.
    Tcp(SocketAddr),
    /// `unix:PATH`.
    Unix(PathBuf),
    /// `-`.
    Stdio,
}

impl Address {
    /// Reads an address.
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = |why: &str| {
            Error::Config(format!(
                "gdb address {text:?} {why}: give HOST:PORT, PORT (on loopback, 0 for any free one), unix:PATH, or -"
            ))
        };
        if text == "-" {
            return Ok(Self::Stdio);
        }
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() { Err(wrong("has no path")) } else { Ok(Self::Unix(path.into())) };
        }
        let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
        let port: u16 = port.parse().map_err(|_| wrong("has no port between 0 and 65535"))?;
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        if host.is_empty() {
            return Ok(Self::Tcp(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)));
        }
        let mut found = (host, port).to_socket_addrs().map_err(|e| wrong(&format!("names an unknown host ({e})")))?;
        found.next().map(Self::Tcp).ok_or_else(|| wrong("names a host without an address"))
    }
}

/// A listening socket. A Unix socket's file goes with it.
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A Unix socket and its path.
    Unix(UnixListener, PathBuf),
    /// Standard input and output, until its one client has been served.
    Stdio(Option<Client>),
}

impl Listener {
    /// Listens at an address.
    pub fn bind(address: &Address) -> Result<Self> {
        let failed = |source: io::Error| Error::Host { what: format!("can't listen for gdb at {address}"), source };
        match address {
            Address::Tcp(at) => {
                let listener = TcpListener::bind(at).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                Ok(Self::Tcp(listener))
            }
            Address::Unix(path) => {
                remove_stale(path);
                let listener = bind_private(path).map_err(|e| failed(e.into()))?;
                listener.set_nonblocking(true).map_err(failed)?;
                Ok(Self::Unix(listener, path.clone()))
            }
            Address::Stdio => {
                let duplicate = |fd: BorrowedFd<'_>| fd.try_clone_to_owned();
                let reader = duplicate(io::stdin().as_fd()).map_err(failed)?;
                let writer = duplicate(io::stdout().as_fd()).map_err(failed)?;
                Ok(Self::Stdio(Some(Client { reader, writer, name: "standard input and output".into() })))
            }
        }
    }

    /// Where it listens, with the port that was chosen: what a client connects to.
    pub fn local(&self) -> String {
        match self {
            Self::Tcp(listener) => listener.local_addr().map_or_else(|_| "tcp".into(), |a| a.to_string()),
            Self::Unix(_, path) => path.display().to_string(),
            Self::Stdio(_) => "-".into(),
        }
    }

    /// What becomes readable when a client comes.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Tcp(listener) => Some(listener.as_fd()),
            Self::Unix(listener, _) => Some(listener.as_fd()),
            Self::Stdio(_) => None,
        }
    }

    /// The next client, if one waits.
    pub fn accept(&mut self) -> Option<Client> {
        match self {
            Self::Tcp(listener) => {
                let (stream, from) = accepted(listener.accept())?;
                let _ = stream.set_nodelay(true);
                Client::socket(stream.into(), from.to_string())
            }
            Self::Unix(listener, path) => {
                let (stream, _) = accepted(listener.accept())?;
                Client::socket(stream.into(), path.display().to_string())
            }
            Self::Stdio(client) => client.take(),
        }
    }
}

/// A connection that waited. One that can't be had for want of descriptors stays, and is tried again a little later.
fn accepted<T>(result: io::Result<T>) -> Option<T> {
    const LATER: std::time::Duration = std::time::Duration::from_millis(50);
    match result {
        Ok(accepted) => Some(accepted),
        Err(error) => {
            if !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) {
                log::warn!("gdb: can't accept a client: {error}");
                std::thread::sleep(LATER);
            }
            None
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(at) => at.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Stdio => f.write_str("-"),
        }
    }
}

/// A Unix socket that only its owner may connect to, from the moment that it exists: Linux gives the file the mode of
/// the socket (`unix(7)`).
fn bind_private(path: &Path) -> nix::Result<UnixListener> {
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
    use std::os::fd::AsRawFd;
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    nix::sys::stat::fchmod(&socket, nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&socket, Backlog::new(16)?)?;
    Ok(socket.into())
}

/// Removes a socket that nobody listens at any more.
fn remove_stale(path: &Path) {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    if is_socket && UnixStream::connect(path).is_err() {
        let _ = std::fs::remove_file(path);
    }
}

/// A connection.
pub struct Client {
    reader: OwnedFd,
    writer: OwnedFd,
    /// Who it is, for messages.
    pub name: String,
}

impl Client {
    fn socket(fd: OwnedFd, name: String) -> Option<Self> {
        let writer = fd.try_clone().ok()?;
        Some(Self { reader: fd, writer, name })
    }

    /// What becomes readable when bytes are there.
    pub fn reader(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }

    /// What becomes writable when there is room.
    pub fn writer(&self) -> BorrowedFd<'_> {
        self.writer.as_fd()
    }

    /// Reads what is there, after a poll that said so. `Ok(0)`: the client is gone.
    pub fn read(&self, buffer: &mut [u8]) -> nix::Result<usize> {
        nix::unistd::read(&self.reader, buffer)
    }

    /// Writes what there is room for, after a poll that said so.
    pub fn write(&self, bytes: &[u8]) -> nix::Result<usize> {
        // A pipe that polls as writable takes this much without blocking; a socket is asked not to block.
        const PIPE_CHUNK: usize = 4096;
        use nix::sys::socket::{MsgFlags, send};
        use std::os::fd::AsRawFd;
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(self.writer.as_raw_fd(), bytes, flags) {
            Err(nix::errno::Errno::ENOTSOCK) => nix::unistd::write(&self.writer, &bytes[..bytes.len().min(PIPE_CHUNK)]),
            result => result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn test_address_without_a_host_is_loopback() {
        let loopback: SocketAddr = "127.0.0.1:1234".parse().unwrap();
        for text in ["1234", ":1234", "127.0.0.1:1234", "localhost:1234"] {
            let Address::Tcp(at) = Address::parse(text).unwrap() else { panic!("{text}") };
            assert!(at.ip().is_loopback() && at.port() == loopback.port(), "{text}: {at}");
        }
        assert_eq!(Address::parse("[::1]:7").unwrap(), Address::Tcp("[::1]:7".parse().unwrap()));
    }

    #[test]
    fn test_address_that_is_none_says_what_to_give() {
        for text in ["", "host:", "1.2.3.4:99999", "unix:", ":port"] {
            assert!(Address::parse(text).unwrap_err().to_string().contains("HOST:PORT"), "{text}");
        }
    }

    #[test]
    fn test_taken_port_fails_and_names_the_address() {
        let first = Listener::bind(&Address::parse("0").unwrap()).unwrap();
        let error = Listener::bind(&Address::parse(&first.local()).unwrap()).err().unwrap();
        assert!(error.to_string().contains(&first.local()), "{error}");
    }

    #[test]
    fn test_unix_socket_is_private_replaces_a_stale_one_and_goes_with_its_listener() {
        let path = std::env::temp_dir().join(format!("uhyve-test-{}", std::process::id()));
        let address = Address::Unix(path.clone());
        // As a killed server leaves it: the file stays.
        drop(UnixListener::bind(&path).unwrap());
        let listener = Listener::bind(&address).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(Listener::bind(&address).is_err());
        drop(listener);
        assert!(!path.exists());
    }
}
