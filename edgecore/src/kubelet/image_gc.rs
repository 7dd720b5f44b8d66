//! Takes unused images off a disk that is filling up, the longest unused first.
//!
//! Never collected: what a container uses, what is pinned, the sandbox image, and what a pod in the store wants. A box that is cut
//! off cannot pull again what was thrown away.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;
use std::time::Duration;

use skerry_proto::cri;
use tracing::{info, warn};

use super::images::canonical;
use super::node::Disk;
use crate::order;
use crate::runtime::Cri;
use crate::runtime::cri::Error;

/// How often to look.
pub const EVERY: Duration = Duration::from_secs(300);

/// When to collect and how much.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Usage in percent from which images are collected.
    pub high: u64,
    /// Usage in percent down to which they are.
    pub low: u64,
    /// None is collected that was first seen less than this ago.
    pub min_age: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self { high: 85, low: 80, min_age: Duration::from_secs(120) }
    }
}

/// What is remembered of images between looks (monotonic times).
#[derive(Clone, Debug, Default)]
pub struct Memory {
    seen: BTreeMap<String, Seen>,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    first: Duration,
    used: Duration,
}

/// What a collection is about to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// Ids of images, in this order.
    pub images: Vec<(String, u64)>,
    /// How many bytes there are to be freed.
    pub wanted: u64,
}

/// What a collection did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// How many images.
    pub images: usize,
    /// How many bytes they said they were.
    pub freed: u64,
    /// Message of the node event `FreeDiskSpaceFailed`, when that was not enough.
    pub short: Option<String>,
}

impl Memory {
    /// Takes down what is there at `now` and what of it is in use. Images that were never seen in use count from when they were seen.
    pub fn note(&mut self, images: &[cri::Image], in_use: &HashSet<String>, now: Duration) {
        let ids: HashSet<&str> = images.iter().map(|image| image.id.as_str()).collect();
        self.seen.retain(|id, _| ids.contains(id.as_str()));
        for image in images {
            let seen = self.seen.entry(image.id.clone()).or_insert(Seen { first: now, used: Duration::ZERO });
            if in_use.contains(&image.id) {
                seen.used = now;
            }
        }
    }

    /// Which images to take away. `spared` are ids.
    pub fn choose(
        &self,
        images: &[cri::Image],
        spared: &HashSet<String>,
        disk: Disk,
        policy: &Policy,
        now: Duration,
    ) -> Choice {
        let used = disk.capacity.saturating_sub(disk.available);
        let percent = |part: u64, of: u64| u64::try_from(u128::from(part) * 100 / u128::from(of.max(1))).unwrap_or(100);
        if disk.capacity == 0 || percent(used, disk.capacity) < policy.high {
            return Choice::default();
        }
        let allowed = u64::try_from(u128::from(disk.capacity) * u128::from(policy.low) / 100).unwrap_or(u64::MAX);
        let wanted = used.saturating_sub(allowed);
        let mut candidates: Vec<(&cri::Image, Seen)> = images
            .iter()
            .filter(|image| !image.pinned && !spared.contains(&image.id))
            .filter_map(|image| Some((image, *self.seen.get(&image.id)?)))
            .filter(|(_, seen)| now.saturating_sub(seen.first) >= policy.min_age && seen.used < now)
            .collect();
        order::sort_by(&mut candidates, |(a, x), (b, y)| (x.used, x.first, &a.id).cmp(&(y.used, y.first, &b.id)));
        let mut chosen = Vec::new();
        let mut freed = 0;
        for (image, _) in candidates {
            if freed >= wanted {
                break;
            }
            freed += image.size;
            chosen.push((image.id.clone(), image.size));
        }
        Choice { images: chosen, wanted }
    }
}

/// The ids of images that these names mean: tags, digests or ids.
pub fn ids_of<'a>(images: &[cri::Image], names: impl IntoIterator<Item = &'a str>) -> HashSet<String> {
    // Both as it is and in full: an id, `sha256:…`, would pass for the tag of an image called sha256.
    let names: BTreeSet<String> =
        names.into_iter().flat_map(|name| canonical(name).into_iter().chain([name.to_owned()])).collect();
    let is_named = |name: &String| names.contains(&canonical(name).unwrap_or_else(|| name.clone()));
    images
        .iter()
        .filter(|image| names.contains(&image.id) || image.repo_tags.iter().chain(&image.repo_digests).any(is_named))
        .map(|image| image.id.clone())
        .collect()
}

/// Looks, and collects if need be. `desired` are the images of all pods in the store and the sandbox image.
pub async fn collect(
    cri: &Cri,
    memory: &mut Memory,
    desired: &BTreeSet<String>,
    policy: &Policy,
    now: Duration,
) -> Result<Collected, Error> {
    let (images, containers) = tokio::try_join!(cri.list_images(), cri.list_containers())?;
    let mut names: BTreeSet<&str> = BTreeSet::new();
    for container in &containers {
        names.extend([container.image_ref.as_str(), container.image_id.as_str()]);
        names.extend(container.image.as_ref().map(|image| image.image.as_str()));
    }
    let in_use = ids_of(&images, names);
    memory.note(&images, &in_use, now);
    let info = cri.image_fs_info().await?;
    let mountpoint = info.image_filesystems.into_iter().find_map(|fs| fs.fs_id).map(|id| id.mountpoint);
    let Some(disk) = mountpoint.and_then(|at| Disk::read(Path::new(&at))) else {
        return Ok(Collected::default());
    };
    let mut spared = ids_of(&images, desired.iter().map(String::as_str));
    spared.extend(in_use);
    let choice = memory.choose(&images, &spared, disk, policy, now);
    let mut collected = Collected::default();
    for (id, size) in choice.images {
        match cri.remove_image(&id).await {
            Ok(()) => {
                info!(image = id, size, "an unused image was removed");
                collected.images += 1;
                collected.freed += size;
            }
            Err(error) if error.is_runtime_down() => return Err(error),
            Err(error) => warn!(image = id, %error, "an unused image could not be removed"),
        }
    }
    if collected.freed < choice.wanted {
        collected.short = Some(format!(
            "Failed to garbage collect required amount of images. Attempted to free {} bytes, but only found {} bytes eligible to free.",
            choice.wanted, collected.freed
        ));
    }
    Ok(collected)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::connect;
    use crate::runtime::fake::{FakeRuntime, Script};

    const MINUTE: Duration = Duration::from_secs(60);

    fn image(id: &str, size: u64, tags: &[&str]) -> cri::Image {
        let repo_tags = tags.iter().map(|tag| (*tag).to_owned()).collect();
        cri::Image { id: id.to_owned(), size, repo_tags, ..Default::default() }
    }

    fn set(ids: &[&str]) -> HashSet<String> {
        ids.iter().map(|id| (*id).to_owned()).collect()
    }

    #[test]
    fn the_longest_unused_goes_first_and_only_as_much_as_needed() {
        let images = [image("a", 40, &[]), image("b", 40, &[]), image("c", 40, &[]), image("new", 999, &[])];
        let mut memory = Memory::default();
        memory.note(&images[..3], &set(&["a", "c"]), MINUTE);
        memory.note(&images[..3], &set(&["a"]), 2 * MINUTE);
        memory.note(&images, &set(&[]), 9 * MINUTE);
        let full = Disk { capacity: 1000, available: 150, ..Default::default() };
        let policy = Policy::default();
        let now = 10 * MINUTE;
        let choice = memory.choose(&images, &set(&[]), full, &policy, now);
        assert_eq!(choice, Choice { images: vec![("b".into(), 40), ("c".into(), 40)], wanted: 50 });
        let choice = memory.choose(&images, &set(&["b", "c"]), full, &policy, now);
        assert_eq!(choice.images, [("a".to_owned(), 40)]);
        let pinned: Vec<_> = images.iter().cloned().map(|image| cri::Image { pinned: true, ..image }).collect();
        assert_eq!(memory.choose(&pinned, &set(&[]), full, &policy, now).images, []);
        let roomy = Disk { capacity: 1000, available: 151, ..Default::default() };
        assert_eq!(memory.choose(&images, &set(&[]), roomy, &policy, now), Choice::default());
    }

    #[test]
    fn a_name_means_its_image_however_it_is_written() {
        let images = [image("sha256:1", 1, &["docker.io/library/busybox:latest"]), image("sha256:2", 1, &["r.io/a:1"])];
        assert_eq!(ids_of(&images, ["busybox"]), set(&["sha256:1"]));
        assert_eq!(ids_of(&images, ["r.io/a:1", "r.io/b:1"]), set(&["sha256:2"]));
        assert_eq!(ids_of(&images, ["sha256:2"]), set(&["sha256:2"]));
    }

    #[tokio::test]
    async fn collects_over_the_runtime_but_not_what_a_pod_wants() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let (endpoint, fake) = FakeRuntime::start(dir.path())?;
        let cri = Cri::new(connect::channel(&endpoint)?);
        fake.image("old:1", Script::default());
        fake.image("wanted:1", Script::default());
        let mut memory = Memory::default();
        let desired = BTreeSet::from(["wanted:1".to_owned()]);
        // Any disk is fuller than this.
        let policy = Policy { high: 0, low: 0, min_age: MINUTE };
        let collected = collect(&cri, &mut memory, &desired, &policy, MINUTE).await?;
        assert_eq!(collected.images, 0);
        let collected = collect(&cri, &mut memory, &desired, &policy, 3 * MINUTE).await?;
        assert_eq!((collected.images, collected.freed), (1, 1000));
        assert!(collected.short.is_some());
        let left: Vec<_> = cri.list_images().await?.into_iter().flat_map(|image| image.repo_tags).collect();
        assert_eq!(left, ["wanted:1"]);
        Ok(())
    }
}
