//! `/logs/`: the files below the box's log directory, to look at. Nothing leads out of it: neither `..` nor a link.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::stream;
use hyper::StatusCode;
use hyper::header::{self, HeaderValue};
use nix::fcntl::OFlag;
use skerry_proto::ops::percent_encode;

use super::answer::{Answer, Refusal, empty, pieces, whole};
use crate::kubelet::context::blocking;
use crate::order;

/// What is served.
pub(super) const ROOT: &str = "/var/log";
/// Bytes that are read at once.
const PIECE: usize = 64 << 10;
/// Entries of a directory that are shown.
const MAX_ENTRIES: usize = 10_000;

enum Found {
    File(File, u64),
    Directory(String),
    /// A directory that was named without the slash at its end, by which its links are read.
    Elsewhere(String),
}

/// Answers with a file, or with a list of a directory's.
pub(super) async fn host_logs(root: &'static str, parts: Vec<String>, slash: bool) -> Result<Answer, Refusal> {
    let found = blocking(move || find(Path::new(root), &parts, slash)).await;
    match found {
        Ok(Found::File(file, size)) => Ok(contents(file, size)),
        Ok(Found::Directory(list)) => Ok(whole("text/html; charset=utf-8", list.into())),
        Ok(Found::Elsewhere(name)) => {
            let mut answer = Answer::new(empty());
            *answer.status_mut() = StatusCode::MOVED_PERMANENTLY;
            let location = HeaderValue::from_str(&name).map_err(|error| Refusal::failed(error.to_string()))?;
            answer.headers_mut().insert(header::LOCATION, location);
            Ok(answer)
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(Refusal::new(StatusCode::FORBIDDEN, "403 Forbidden"))
        }
        Err(_) => Err(Refusal::missing("404 page not found")),
    }
}

fn find(root: &Path, parts: &[String], slash: bool) -> io::Result<Found> {
    let outside = || io::Error::from(io::ErrorKind::NotFound);
    if parts.iter().any(|part| part == ".." || part == "." || part.contains(['/', '\0'])) {
        return Err(outside());
    }
    let root = fs::canonicalize(root)?;
    let path = fs::canonicalize(root.join(parts.iter().collect::<PathBuf>()))?;
    if !path.starts_with(&root) {
        return Err(outside());
    }
    // No pipe holds up anybody.
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW | OFlag::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(&path)?;
    let data = file.metadata()?;
    // A link may have come in the way meanwhile: what is open has to be what was judged.
    let now = fs::symlink_metadata(fs::canonicalize(&path)?)?;
    if (data.dev(), data.ino()) != (now.dev(), now.ino()) || fs::canonicalize(&path)? != path {
        return Err(outside());
    }
    if data.is_file() {
        return Ok(Found::File(file, data.len()));
    }
    if !data.is_dir() {
        return Err(outside());
    }
    if !slash && let Some(name) = parts.last() {
        return Ok(Found::Elsewhere(format!("{}/", percent_encode(name))));
    }
    let mut names: Vec<String> = Vec::new();
    for entry in fs::read_dir(&path)?.take(MAX_ENTRIES) {
        let entry = entry?;
        let end = if entry.file_type()?.is_dir() { "/" } else { "" };
        names.push(format!("{}{end}", entry.file_name().to_string_lossy()));
    }
    order::sort(&mut names);
    let link = |name: &String| {
        let (plain, end) = name.strip_suffix('/').map_or((name.as_str(), ""), |plain| (plain, "/"));
        format!("<a href=\"{}{end}\">{}</a>\n", percent_encode(plain), escape(name))
    };
    Ok(Found::Directory(format!("<pre>\n{}</pre>\n", names.iter().map(link).collect::<String>())))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&#34;").replace('\'', "&#39;")
}

/// As much as there was when it was opened: a log that grows has an end all the same.
fn contents(file: File, size: u64) -> Answer {
    let body = stream::try_unfold((file, size), |(mut file, left)| async move {
        if left == 0 {
            return Ok(None);
        }
        let read = blocking(move || {
            let mut piece = Vec::with_capacity(PIECE.min(usize::try_from(left).unwrap_or(PIECE)));
            (&mut file).take(left.min(PIECE as u64)).read_to_end(&mut piece).map(|_| (piece, file))
        });
        let (piece, file) = read.await?;
        if piece.is_empty() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file was cut short"));
        }
        let left = left - piece.len() as u64;
        Ok(Some((Bytes::from(piece), (file, left))))
    });
    let mut answer = pieces("text/plain; charset=utf-8", body);
    answer.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(size));
    answer
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use http_body_util::BodyExt as _;

    use super::*;

    async fn get(root: &Path, path: &str) -> (u16, String) {
        let root: &'static str = Box::leak(root.to_str().unwrap().to_owned().into_boxed_str());
        let parts: Vec<String> = path.split('/').filter(|part| !part.is_empty()).map(str::to_owned).collect();
        match host_logs(root, parts, path.ends_with('/')).await {
            Ok(answer) => {
                let status = answer.status().as_u16();
                let body = answer.into_body().collect().await.unwrap().to_bytes();
                (status, String::from_utf8(body.to_vec()).unwrap())
            }
            Err(refusal) => (refusal.status.as_u16(), refusal.words),
        }
    }

    #[tokio::test]
    async fn files_and_directories_are_shown_and_nothing_outside() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("log");
        fs::create_dir_all(root.join("pods/a<b")).unwrap();
        fs::write(dir.path().join("secret"), "no").unwrap();
        let long = "x".repeat(200_000);
        fs::write(root.join("messages"), &long).unwrap();
        symlink(root.join("messages"), root.join("inside")).unwrap();
        symlink(dir.path().join("secret"), root.join("outside")).unwrap();
        symlink("..", root.join("pods/up")).unwrap();
        symlink("../..", root.join("pods/far")).unwrap();
        assert_eq!(get(&root, "messages").await, (200, long.clone()));
        assert_eq!(get(&root, "inside").await, (200, long.clone()));
        assert_eq!(get(&root, "pods/up/messages").await, (200, long));
        let (status, list) = get(&root, "/").await;
        assert!(status == 200 && list.contains("<a href=\"pods/\">pods/</a>"), "{list}");
        assert!(get(&root, "pods/").await.1.contains("<a href=\"a%3Cb/\">a&lt;b/</a>"));
        assert_eq!(get(&root, "pods").await.0, 301);
        for path in
            ["outside", "../secret", "pods/../../secret", "pods/far/secret", "pods/far/", "none", "pods/../messages"]
        {
            assert_eq!(get(&root, path).await.0, 404, "{path}");
        }
        nix::unistd::mkfifo(&root.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(get(&root, "pipe").await.0, 404);
    }
}
