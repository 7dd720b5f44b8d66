//! Container log files: where they are, rotation, the links for log collectors, removal.
//!
//! The runtime writes `<n>.log`; this renames it when it is large and has the runtime open a new one. Rotated files are called
//! `<n>.log.<time>` and are not compressed: collectors read them as they are, and flash is saved by keeping few. Their names sort in the
//! order of rotation even when the box's clock jumps back. Nothing here follows a link out of the log directory.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use jiff::civil::DateTime;
use jiff::{Timestamp, ToSpan};

use super::dirs::{At, PathError, is_plain_name, make_dirs};
use super::volumes::tree;
use crate::order;

/// Size at which a log is rotated.
pub const MAX_SIZE: u64 = 10 * 1024 * 1024;
/// Files per container, the one being written included.
pub const MAX_FILES: usize = 5;

const STAMP: &str = "%Y%m%d-%H%M%S";
const NAME_MAX: usize = 255;

/// What a look at a log file showed and did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rotation {
    /// It is small.
    NotDue,
    /// It is missing: the runtime has to open a new one.
    Missing,
    /// It is called this now, and the runtime has to open a new one. If it does not: [`put_back`].
    Renamed(PathBuf),
}

/// What is to be done with a log that is too large.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RotationPlan {
    /// File names to remove.
    pub remove: Vec<String>,
    /// Name that the current file gets.
    pub rename_to: String,
}

/// Directory of a pod's logs.
pub fn pod_dir(logs_root: &Path, namespace: &str, name: &str, uid: &str) -> PathBuf {
    logs_root.join(format!("{namespace}_{name}_{uid}"))
}

/// Makes the directory of a container's logs, and its pod's.
pub fn make_container_dir(pod_dir: &Path, container: &str) -> Result<PathBuf, PathError> {
    let dir = pod_dir.join(container);
    make_dirs(&dir, 0o755)?;
    Ok(dir)
}

/// Decides about a log `file` (such as `0.log`) that has grown too large, beside `others` in its directory: leftovers of a rotation that
/// was cut short go, and the oldest rotated ones, so that with the current and a new one there are `max_files`.
pub fn plan_rotation(file: &str, others: &[String], max_files: usize, now: Timestamp) -> RotationPlan {
    let mut rotated = Vec::new();
    let mut remove = Vec::new();
    for name in others {
        let Some(suffix) = name.strip_prefix(file).and_then(|rest| rest.strip_prefix('.')) else { continue };
        let (stamp, is_compressed) = suffix.strip_suffix(".gz").map_or((suffix, false), |stamp| (stamp, true));
        let has_twin = !is_compressed && others.iter().any(|other| *other == format!("{name}.gz"));
        match DateTime::strptime(STAMP, stamp) {
            Ok(stamp) if !has_twin => rotated.push((stamp, name)),
            // An uncompressed twin, or a file that was being written when the lights went out.
            Ok(_) => remove.push(name.clone()),
            Err(_) if suffix.ends_with(".tmp") => remove.push(name.clone()),
            Err(_) => {}
        }
    }
    order::sort(&mut rotated);
    let newest = rotated.last().map(|(stamp, _)| *stamp);
    let kept = max_files.saturating_sub(2);
    let excess = rotated.len().saturating_sub(kept);
    remove.extend(rotated.iter().take(excess).map(|(_, name)| (*name).clone()));
    let now = jiff::tz::TimeZone::UTC.to_datetime(now);
    let next = newest.and_then(|newest| newest.checked_add(1.second()).ok());
    let stamp = next.map_or(now, |next| now.max(next));
    RotationPlan { remove, rename_to: format!("{file}.{}", stamp.strftime(STAMP)) }
}

/// First half of a rotation: looks at the file, and when it is `max_size` or more renames it and removes the oldest.
pub fn start_rotation(file: &Path, max_size: u64, max_files: usize, now: Timestamp) -> Result<Rotation, PathError> {
    let size = match fs::symlink_metadata(file) {
        Ok(data) => data.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Rotation::Missing),
        Err(error) => return Err(error).at("look at", file),
    };
    if size < max_size {
        return Ok(Rotation::NotDue);
    }
    let (Some(dir), Some(name)) = (file.parent(), file.file_name().and_then(|name| name.to_str())) else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput)).at("rotate", file);
    };
    let plan = plan_rotation(name, &names_in(dir)?, max_files, now);
    for name in &plan.remove {
        remove_file(&dir.join(name))?;
    }
    let renamed = dir.join(plan.rename_to);
    fs::rename(file, &renamed).at("rename", file)?;
    Ok(Rotation::Renamed(renamed))
}

/// What was rotated from a log and is still there, the oldest first.
pub fn rotated(file: &Path) -> Result<Vec<PathBuf>, PathError> {
    let (Some(dir), Some(name)) = (file.parent(), file.file_name().and_then(|name| name.to_str())) else {
        return Ok(Vec::new());
    };
    let stamp = |other: &str| DateTime::strptime(STAMP, other.strip_prefix(name)?.strip_prefix('.')?).ok();
    let mut rotated: Vec<_> = names_in(dir)?.into_iter().filter_map(|other| Some((stamp(&other)?, other))).collect();
    order::sort(&mut rotated);
    Ok(rotated.into_iter().map(|(_, name)| dir.join(name)).collect())
}

/// Gives a renamed log its name back, when the runtime did not open a new one. One that did appear stays.
pub fn put_back(file: &Path, renamed: &Path) -> Result<(), PathError> {
    match fs::hard_link(renamed, file) {
        Ok(()) => fs::remove_file(renamed).at("remove", renamed),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        // No hard links on this file system.
        Err(_) => fs::rename(renamed, file).at("rename", renamed),
    }
}

/// Name of a container's link for log collectors. Too long a name loses the end of what stands before the container's id.
pub fn link_name(namespace: &str, pod: &str, container: &str, id: &str) -> String {
    let mut name = format!("{pod}_{namespace}_{container}");
    let tail = format!("-{id}.log");
    let mut room = NAME_MAX.saturating_sub(tail.len()).min(name.len());
    while !name.is_char_boundary(room) {
        room -= 1;
    }
    name.truncate(room);
    name + &tail
}

/// Makes or corrects a link for log collectors.
pub fn link(links: &Path, name: &str, log: &Path) -> Result<(), PathError> {
    make_dirs(links, 0o755)?;
    let path = links.join(name);
    match fs::read_link(&path) {
        Ok(target) if target == log => return Ok(()),
        Ok(_) => remove_file(&path)?,
        Err(_) => {}
    }
    match symlink(log, &path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Err(error).at("link, as a file has its name,", &path)
        }
        other => other.at("link", &path),
    }
}

/// Removes a container's log with everything that was rotated from it, and its link.
pub fn remove_container(log: &Path, link: &Path) -> Result<(), PathError> {
    if let (Some(dir), Some(name)) = (log.parent(), log.file_name().and_then(|name| name.to_str())) {
        for other in names_in(dir)? {
            if other.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')) {
                remove_file(&dir.join(other))?;
            }
        }
        // Only goes when it is empty.
        let _ = fs::remove_dir(dir);
    }
    if fs::read_link(link).is_ok() {
        remove_file(link)?;
    }
    Ok(())
}

/// The number the next attempt of a container needs so that no log in its directory is overwritten.
pub fn next_attempt(container_dir: &Path) -> i32 {
    let names = names_in(container_dir).unwrap_or_default();
    let numbers = names.iter().filter_map(|name| name.strip_suffix(".log")?.parse::<i32>().ok());
    numbers.max().map_or(0, |highest| highest.saturating_add(1))
}

/// Current logs of containers (`<pod>/<container>/<n>.log`) to do something about: those that have grown to `size` bytes, and those that were
/// rotated away by an agent that died before the runtime had opened another.
pub fn due(logs_root: &Path, size: u64) -> Vec<PathBuf> {
    let mut due = Vec::new();
    for (_, pod) in pod_dirs(logs_root).unwrap_or_default() {
        for container in names_in(&pod).unwrap_or_default() {
            let directory = pod.join(container);
            let names = names_in(&directory).unwrap_or_default();
            for name in &names {
                let Some(number) = name.find(".log") else { continue };
                let current = &name[..number + ".log".len()];
                let file = directory.join(current);
                let is_due = if name == current {
                    fs::symlink_metadata(&file).is_ok_and(|data| data.len() >= size)
                } else {
                    !names.iter().any(|other| other == current)
                };
                if is_due && !due.contains(&file) {
                    due.push(file);
                }
            }
        }
    }
    due
}

/// Removes all logs of a pod.
pub fn remove_pod(pod_dir: &Path) -> Result<(), PathError> {
    tree::remove(pod_dir).at("remove", pod_dir)
}

/// The pod log directories there are, with the UID each name ends in.
pub fn pod_dirs(logs_root: &Path) -> Result<Vec<(String, PathBuf)>, PathError> {
    let mut dirs = Vec::new();
    for name in names_in(logs_root)? {
        let mut parts = name.split('_');
        if let (Some(_), Some(_), Some(uid), None) = (parts.next(), parts.next(), parts.next(), parts.next())
            && is_plain_name(uid)
        {
            dirs.push((uid.to_owned(), logs_root.join(&name)));
        }
    }
    order::sort(&mut dirs);
    Ok(dirs)
}

/// Removes the links whose log is gone, of the containers that `is_over` says have ended or are not known.
pub fn remove_dangling(links: &Path, is_over: impl Fn(&str) -> bool) -> Result<usize, PathError> {
    let mut removed = 0;
    for name in names_in(links)? {
        let path = links.join(&name);
        let Some(id) = name.strip_suffix(".log").and_then(|name| name.rsplit_once('-')).map(|(_, id)| id) else {
            continue;
        };
        let is_dangling = fs::read_link(&path).is_ok()
            && matches!(fs::metadata(&path), Err(error) if error.kind() == io::ErrorKind::NotFound);
        if is_dangling && is_over(id) {
            remove_file(&path)?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// Bytes on disk of what is below a directory, links not followed, other file systems not entered. Looks at no more than `most` entries;
/// `false` beside the sum says that there were more.
pub fn disk_usage(dir: &Path, most: usize) -> (u64, bool) {
    let Ok(top) = fs::symlink_metadata(dir) else { return (0, true) };
    let mut sum = top.blocks() * 512;
    let mut left = most;
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            if left == 0 {
                return (sum, false);
            }
            left -= 1;
            let Ok(data) = entry.metadata() else { continue };
            if data.dev() != top.dev() {
                continue;
            }
            sum += data.blocks() * 512;
            if data.is_dir() {
                dirs.push(entry.path());
            }
        }
    }
    (sum, true)
}

/// Names in a directory; none when it is gone. What is not UTF-8 is nobody's log.
fn names_in(dir: &Path) -> Result<Vec<String>, PathError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).at("list", dir),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.at("list", dir)?.file_name();
        if let Ok(name) = std::str::from_utf8(name.as_bytes()) {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

fn remove_file(path: &Path) -> Result<(), PathError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).at("remove", path),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
