//! The volumes of pods on this box: directories, memory, links and mounts below `pods/<uid>`.
//!
//! Owns everything below a pod's `volumes` and `volume-subpaths`. Setting up is idempotent and is called at every sync: what is
//! right already costs a few reads, what a crash left half done is finished, changed objects appear in the files at once. Tearing
//! down never deletes across a mount. All functions block; the caller runs one at a time per pod, on a thread that may wait.
//!
//! Volumes that need a driver (claims, CSI, network file systems, images) are refused by name; no pod starts without a volume it asked for.

mod atomic;
mod empty_dir;
mod error;
mod fs_group;
mod host_path;
pub(crate) mod mountinfo;
mod projected;
mod subpath;
mod tear_down;
pub(crate) mod tree;

#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, Volume, VolumeMount};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use nix::mount::{MsFlags, mount};

use super::dirs::{At, PathError, PodDirs, is_plain_name, make_dirs};
use super::expand::{expand_strict, value_in};
use super::references::{NodeFacts, References};
use crate::order;
use atomic::{AtomicWriter, Payload};
pub use error::{Reason, VolumeError};
use projected::Sources;
pub use tear_down::TearDownError;

/// The volumes below one kubelet root.
#[derive(Clone, Debug)]
pub struct Volumes {
    root: PathBuf,
}

/// What setting up needs to know beside the pod and the objects it refers to.
#[derive(Clone, Copy)]
pub struct VolumeContext<'a> {
    /// Bounds volumes in memory.
    pub node: &'a NodeFacts,
    /// The memory limit of the whole pod in bytes, if every container has one. Bounds volumes in memory.
    pub pod_memory_limit: Option<i64>,
    /// Wall time; only names directories.
    pub now: Timestamp,
    /// Value of a downward API field, by its path.
    pub field: &'a dyn Fn(&str) -> Result<String, String>,
    /// Value of a resource of a container: container, resource, divisor.
    pub resource: &'a ResourceValue<'a>,
}

/// See [`VolumeContext::resource`].
pub type ResourceValue<'a> = dyn Fn(&str, &str, Option<&Quantity>) -> Result<String, String> + 'a;

/// A mount for a container, as CRI takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where in the container.
    pub container_path: String,
    /// What of the box.
    pub host_path: PathBuf,
    /// The container may not write.
    pub read_only: bool,
    /// Which mounts cross between box and container.
    pub propagation: Propagation,
    /// Also what is mounted below it is read-only.
    pub recursive_read_only: bool,
}

/// Which mounts that appear later cross between the box and a container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Propagation {
    /// None.
    #[default]
    Private,
    /// From the box into the container.
    HostToContainer,
    /// Both ways.
    Bidirectional,
}

impl Volumes {
    /// The volumes below `/var/lib/kubelet`, or wherever pod directories are.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Sees to it that mounts below the root reach containers and come back from them (mount propagation), which needs the root to be
    /// on a shared mount. Where the system's mounts are private, the root is bound onto itself, which `edgecore reset` undoes.
    /// `false`: that was not possible any more, because pods have mounts there already, which would be hidden for good.
    pub fn share(&self) -> Result<bool, PathError> {
        make_dirs(&self.root, 0o750)?;
        let root = fs::canonicalize(&self.root).at("find", &self.root)?;
        let table = mountinfo::read().at("read the mount table for", &root)?;
        let carrier =
            table.iter().rfind(|entry| root.starts_with(&entry.mount_point) && is_nearest(&table, entry, &root));
        if carrier.is_some_and(|entry| entry.is_shared) {
            return Ok(true);
        }
        let nothing = None::<&str>;
        if carrier.is_none_or(|entry| entry.mount_point != root) {
            if table.iter().any(|entry| entry.mount_point.starts_with(&root)) {
                return Ok(false);
            }
            mount(Some(&root), &root, nothing, MsFlags::MS_BIND, nothing).at("bind onto itself", &root)?;
        }
        mount(nothing, &root, nothing, MsFlags::MS_SHARED, nothing).at("share mounts below", &root)?;
        Ok(true)
    }

    /// Makes all volumes that containers of the pod mount, and brings their files up to date. Every volume is tried; what cannot be
    /// set up keeps the content it had.
    pub fn set_up(&self, pod: &Pod, refs: &References, context: &VolumeContext<'_>) -> Result<(), Vec<VolumeError>> {
        let dirs = self.dirs(pod).map_err(|error| vec![error])?;
        dirs.create().map_err(|error| vec![error.into()])?;
        let fs_group = fs_group_of(pod);
        let sources = Sources { pod, refs, context, fs_group };
        let used = used_volumes(pod);
        let errors: Vec<_> = volumes_of(pod)
            .filter(|volume| used.contains(volume.name.as_str()))
            .filter_map(|volume| {
                let reason = set_up_one(&dirs, volume, &sources).err()?;
                Some(VolumeError::SetUp { volume: volume.name.clone(), reason })
            })
            .collect();
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    /// The mounts of one container, after [`Volumes::set_up`]. Binds the parts of volumes it asks for by subPath; `env` is the
    /// container's, for subPathExpr. `recursive_read_only`: the pod's runtime handler can do that.
    pub fn mounts(
        &self,
        pod: &Pod,
        container: &Container,
        env: &[(String, String)],
        recursive_read_only: bool,
    ) -> Result<Vec<Mount>, VolumeError> {
        let dirs = self.dirs(pod)?;
        let mounts = container.volume_mounts.iter().flatten().enumerate();
        mounts
            .map(|(index, wanted)| {
                let missing =
                    || VolumeError::NotFound { volume: wanted.name.clone(), container: container.name.clone() };
                let volume = volumes_of(pod).find(|volume| volume.name == wanted.name).ok_or_else(missing)?;
                let kind = Kind::of(volume);
                let whole = kind.path(&dirs, &volume.name).ok_or_else(missing)?;
                if !matches!(kind, Kind::HostPath(_)) && !whole.is_dir() {
                    return Err(missing());
                }
                let target = is_plain_name(&container.name).then(|| dirs.subpath(&volume.name, &container.name, index));
                let host_path = match sub_path(wanted, env) {
                    Ok(None) => whole,
                    Ok(Some(part)) => bind_part(&whole, &part, target.ok_or_else(missing)?)
                        .map_err(|error| sub_path_error(&error, &wanted.name, &container.name))?,
                    Err(error) => return Err(sub_path_error(&error, &wanted.name, &container.name)),
                };
                let read_only = wanted.read_only.unwrap_or(false) || kind.is_payload();
                Ok(Mount {
                    container_path: absolute(&wanted.mount_path),
                    host_path,
                    read_only,
                    propagation: propagation(wanted)?,
                    recursive_read_only: recursive(wanted, recursive_read_only)?,
                })
            })
            .collect()
    }

    fn dirs(&self, pod: &Pod) -> Result<PodDirs, VolumeError> {
        Ok(PodDirs::new(&self.root, pod.metadata.uid.as_deref().unwrap_or_default())?)
    }
}

/// A volume by what it takes to provide it.
enum Kind<'a> {
    EmptyDir(&'a k8s_openapi::api::core::v1::EmptyDirVolumeSource),
    HostPath(&'a k8s_openapi::api::core::v1::HostPathVolumeSource),
    ConfigMap(&'a k8s_openapi::api::core::v1::ConfigMapVolumeSource),
    Secret(&'a k8s_openapi::api::core::v1::SecretVolumeSource),
    DownwardApi(&'a k8s_openapi::api::core::v1::DownwardAPIVolumeSource),
    Projected(&'a k8s_openapi::api::core::v1::ProjectedVolumeSource),
    Unsupported(&'static str),
}

impl<'a> Kind<'a> {
    fn of(volume: &'a Volume) -> Self {
        if let Some(source) = &volume.empty_dir {
            Self::EmptyDir(source)
        } else if let Some(source) = &volume.host_path {
            Self::HostPath(source)
        } else if let Some(source) = &volume.config_map {
            Self::ConfigMap(source)
        } else if let Some(source) = &volume.secret {
            Self::Secret(source)
        } else if let Some(source) = &volume.downward_api {
            Self::DownwardApi(source)
        } else if let Some(source) = &volume.projected {
            Self::Projected(source)
        } else {
            Self::Unsupported(unsupported_type(volume))
        }
    }

    /// The plugin's name in paths, for what has a directory of its own.
    fn plugin(&self) -> Option<&'static str> {
        match self {
            Self::EmptyDir(_) => Some(empty_dir::PLUGIN),
            Self::ConfigMap(_) => Some("kubernetes.io/configmap"),
            Self::Secret(_) => Some("kubernetes.io/secret"),
            Self::DownwardApi(_) => Some("kubernetes.io/downward-api"),
            Self::Projected(_) => Some("kubernetes.io/projected"),
            Self::HostPath(_) | Self::Unsupported(_) => None,
        }
    }

    /// Its files come from the store and containers may only read them.
    fn is_payload(&self) -> bool {
        matches!(self, Self::ConfigMap(_) | Self::Secret(_) | Self::DownwardApi(_) | Self::Projected(_))
    }

    /// Where it is on this box.
    fn path(&self, dirs: &PodDirs, name: &str) -> Option<PathBuf> {
        match self {
            Self::HostPath(source) => Some(PathBuf::from(&source.path)),
            _ => self.plugin().filter(|_| is_plain_name(name)).map(|plugin| dirs.volume(plugin, name)),
        }
    }
}

fn set_up_one(dirs: &PodDirs, volume: &Volume, sources: &Sources<'_>) -> Result<(), Reason> {
    let name = volume.name.as_str();
    if !is_plain_name(name) {
        return Err(Reason::Name(name.to_owned()));
    }
    let kind = Kind::of(volume);
    let payload = match &kind {
        Kind::EmptyDir(source) => return empty_dir::set_up(dirs, name, source, sources.fs_group, sources.context),
        Kind::HostPath(source) => return host_path::check(source),
        Kind::Unsupported(kind) => return Err(Reason::Unsupported(kind)),
        Kind::ConfigMap(source) => {
            sources.config_map(&source.name, source.items.as_deref(), source.optional, source.default_mode)?
        }
        Kind::Secret(source) => {
            let secret = source.secret_name.as_deref().unwrap_or_default();
            sources.secret(secret, source.items.as_deref(), source.optional, source.default_mode)?
        }
        Kind::DownwardApi(source) => {
            sources.downward_api(source.items.as_deref().unwrap_or_default(), source.default_mode)?
        }
        Kind::Projected(source) => sources.projected(source)?,
    };
    let Some(dir) = kind.path(dirs, name) else { return Err(Reason::Name(name.to_owned())) };
    let in_memory = !matches!(kind, Kind::ConfigMap(_));
    set_up_payload(&dir, in_memory, &payload, name, sources)
}

fn set_up_payload(
    dir: &Path,
    in_memory: bool,
    payload: &Payload<'_>,
    name: &str,
    sources: &Sources<'_>,
) -> Result<(), Reason> {
    if !in_memory {
        empty_dir::make_open_dir(dir)?;
    } else if !empty_dir::is_mounted(dir) {
        empty_dir::make_open_dir(dir)?;
        empty_dir::ensure_tmpfs(dir, empty_dir::tmpfs_size(None, sources.context))?;
    }
    for nested in nested_mount_points(sources.pod, name) {
        make_dirs(&dir.join(nested), 0o755)?;
    }
    if let Some(group) = sources.fs_group {
        fs_group::apply_to_dir(dir, group, true).at("set the group of", dir)?;
    }
    AtomicWriter { dir, fs_group: sources.fs_group }.write(payload, sources.context.now)?;
    Ok(())
}

/// Directories inside a read-only volume on which containers mount other volumes, relative to it: a runtime could not make them.
fn nested_mount_points(pod: &Pod, volume: &str) -> BTreeSet<PathBuf> {
    let mut nested = BTreeSet::new();
    for mounts in all_mounts(pod) {
        for own in mounts.iter().filter(|mount| mount.name == volume && !has_sub_path(mount)) {
            let top = PathBuf::from(absolute(&own.mount_path));
            let mut inside: Vec<PathBuf> = mounts
                .iter()
                .filter_map(|other| Some(Path::new(&absolute(&other.mount_path)).strip_prefix(&top).ok()?.to_owned()))
                .filter(|path| path.components().all(|part| matches!(part, Component::Normal(_))))
                .filter(|path| !path.as_os_str().is_empty() && !path.to_string_lossy().starts_with(".."))
                .collect();
            // What lies inside another nested mount is that one's matter.
            order::sort(&mut inside);
            let mut kept: Vec<PathBuf> = Vec::new();
            for path in inside {
                if !kept.iter().any(|outer| path.starts_with(outer)) {
                    kept.push(path);
                }
            }
            nested.extend(kept);
        }
    }
    nested
}

fn volumes_of(pod: &Pod) -> impl Iterator<Item = &Volume> {
    pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten())
}

/// The mounts of every container of every sort.
fn all_mounts(pod: &Pod) -> impl Iterator<Item = &[VolumeMount]> {
    pod.spec.iter().flat_map(|spec| {
        let containers = spec.init_containers.iter().flatten().chain(&spec.containers);
        let mounts = containers.map(|container| container.volume_mounts.as_deref().unwrap_or_default());
        let ephemeral = spec.ephemeral_containers.iter().flatten();
        mounts.chain(ephemeral.map(|container| container.volume_mounts.as_deref().unwrap_or_default()))
    })
}

/// Names of the volumes that some container uses; the others are not made.
fn used_volumes(pod: &Pod) -> BTreeSet<&str> {
    let mounted = all_mounts(pod).flatten().map(|mount| mount.name.as_str());
    let containers = pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten().chain(&spec.containers));
    let devices = containers.flat_map(|container| container.volume_devices.iter().flatten());
    order::set(mounted.chain(devices.map(|device| device.name.as_str())))
}

fn fs_group_of(pod: &Pod) -> Option<u32> {
    let context = pod.spec.as_ref()?.security_context.as_ref()?;
    u32::try_from(context.fs_group?).ok()
}

fn has_sub_path(mount: &VolumeMount) -> bool {
    [&mount.sub_path, &mount.sub_path_expr].into_iter().flatten().any(|path| !path.is_empty())
}

fn sub_path(mount: &VolumeMount, env: &[(String, String)]) -> Result<Option<String>, subpath::SubPathError> {
    let given = |path: &Option<String>| path.clone().filter(|path| !path.is_empty());
    match (given(&mount.sub_path), given(&mount.sub_path_expr)) {
        (Some(path), _) => Ok(Some(path)),
        (None, Some(expression)) => {
            expand_strict(&expression, |name| value_in(env, name)).map(Some).map_err(Into::into)
        }
        (None, None) => Ok(None),
    }
}

fn bind_part(volume: &Path, part: &str, target: PathBuf) -> Result<PathBuf, subpath::SubPathError> {
    if !volume.exists() {
        // A hostPath without a type may be missing; the runtime would make it, but it needs its part now.
        make_dirs(volume, 0o755)?;
    }
    let found = subpath::open(volume, part)?;
    subpath::bind(&found, &target)?;
    Ok(target)
}

fn sub_path_error(error: &subpath::SubPathError, mount: &str, container: &str) -> VolumeError {
    let (mount, container, why) = (mount.to_owned(), container.to_owned(), error.to_string());
    match error {
        subpath::SubPathError::Make { .. } => VolumeError::SubPathDirectory { mount, container, why },
        _ => VolumeError::SubPath { mount, container, why },
    }
}

fn propagation(mount: &VolumeMount) -> Result<Propagation, VolumeError> {
    match mount.mount_propagation.as_deref().unwrap_or("None") {
        "" | "None" => Ok(Propagation::Private),
        "HostToContainer" => Ok(Propagation::HostToContainer),
        "Bidirectional" => Ok(Propagation::Bidirectional),
        other => Err(unknown(mount, "mountPropagation", other)),
    }
}

fn recursive(mount: &VolumeMount, is_supported: bool) -> Result<bool, VolumeError> {
    match mount.recursive_read_only.as_deref().unwrap_or("Disabled") {
        "" | "Disabled" => Ok(false),
        "IfPossible" => Ok(is_supported),
        "Enabled" if is_supported => Ok(true),
        "Enabled" => Err(VolumeError::RecursiveReadOnly { mount: mount.name.clone() }),
        other => Err(unknown(mount, "recursiveReadOnly", other)),
    }
}

fn unknown(mount: &VolumeMount, field: &'static str, value: &str) -> VolumeError {
    VolumeError::Value { mount: mount.name.clone(), field, value: value.to_owned() }
}

fn absolute(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
}

fn is_nearest(table: &[mountinfo::Entry], entry: &mountinfo::Entry, path: &Path) -> bool {
    let depth = |entry: &mountinfo::Entry| entry.mount_point.components().count();
    table.iter().filter(|other| path.starts_with(&other.mount_point)).all(|other| depth(other) <= depth(entry))
}

fn unsupported_type(volume: &Volume) -> &'static str {
    let types = [
        (volume.persistent_volume_claim.is_some(), "persistentVolumeClaim"),
        (volume.ephemeral.is_some(), "ephemeral"),
        (volume.csi.is_some(), "csi"),
        (volume.nfs.is_some(), "nfs"),
        (volume.iscsi.is_some(), "iscsi"),
        (volume.image.is_some(), "image"),
        (volume.fc.is_some(), "fc"),
        (volume.cephfs.is_some(), "cephfs"),
        (volume.rbd.is_some(), "rbd"),
        (volume.glusterfs.is_some(), "glusterfs"),
        (volume.git_repo.is_some(), "gitRepo"),
        (volume.flex_volume.is_some(), "flexVolume"),
        (volume.flocker.is_some(), "flocker"),
        (volume.aws_elastic_block_store.is_some(), "awsElasticBlockStore"),
        (volume.gce_persistent_disk.is_some(), "gcePersistentDisk"),
        (volume.azure_disk.is_some(), "azureDisk"),
        (volume.azure_file.is_some(), "azureFile"),
        (volume.cinder.is_some(), "cinder"),
        (volume.vsphere_volume.is_some(), "vsphereVolume"),
        (volume.photon_persistent_disk.is_some(), "photonPersistentDisk"),
        (volume.portworx_volume.is_some(), "portworxVolume"),
        (volume.quobyte.is_some(), "quobyte"),
        (volume.scale_io.is_some(), "scaleIO"),
        (volume.storageos.is_some(), "storageos"),
    ];
    types.iter().find(|(is_set, _)| *is_set).map_or("of no known source", |(_, name)| name)
}
