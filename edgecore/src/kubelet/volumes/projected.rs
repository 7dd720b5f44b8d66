//! The files of configMap, secret, downwardAPI and projected volumes, put together from what the store holds.
//!
//! Nothing is fetched: what is not there is an error, unless it is optional. An expired token is still handed out, because a pod that
//! was alive offline yesterday shall start offline today; whoever reads it decides.

use std::borrow::Cow;
use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{
    ConfigMap, DownwardAPIVolumeFile, KeyToPath, Pod, ProjectedVolumeSource, Secret, ServiceAccountTokenProjection,
    VolumeProjection,
};
use skerry_proto::payload::token_key;

use super::atomic::{File, Payload};
use super::{Reason, VolumeContext};
use crate::kubelet::references::References;

const DEFAULT_MODE: u32 = 0o644;
const DEFAULT_TOKEN_SECONDS: i64 = 3600;

/// What payloads are made from.
pub(super) struct Sources<'a> {
    pub(super) pod: &'a Pod,
    pub(super) refs: &'a References,
    pub(super) context: &'a VolumeContext<'a>,
    pub(super) fs_group: Option<u32>,
}

/// Which keys of an object become files.
struct Selection<'a> {
    items: Option<&'a [KeyToPath]>,
    optional: bool,
    mode: u32,
}

impl<'a> Sources<'a> {
    /// Files of a configMap volume.
    pub(super) fn config_map(
        &self,
        name: &'a str,
        items: Option<&'a [KeyToPath]>,
        optional: Option<bool>,
        default_mode: Option<i32>,
    ) -> Result<Payload<'a>, Reason> {
        let selection = Selection { items, optional: optional.unwrap_or(false), mode: mode_of(default_mode) };
        match self.refs.config_maps.get(name) {
            Some(object) => {
                select(&selection, |key| config_map_value(object, key), config_map_keys(object), Reason::ConfigMapKey)
            }
            None if selection.optional => Ok(Payload::new()),
            None => Err(Reason::ConfigMapNotFound(name.to_owned())),
        }
    }

    /// Files of a secret volume.
    pub(super) fn secret(
        &self,
        name: &'a str,
        items: Option<&'a [KeyToPath]>,
        optional: Option<bool>,
        default_mode: Option<i32>,
    ) -> Result<Payload<'a>, Reason> {
        let selection = Selection { items, optional: optional.unwrap_or(false), mode: mode_of(default_mode) };
        match self.refs.secrets.get(name) {
            Some(object) => select(&selection, |key| secret_value(object, key), secret_keys(object), Reason::SecretKey),
            None if selection.optional => Ok(Payload::new()),
            None => Err(Reason::SecretNotFound(name.to_owned())),
        }
    }

    /// Files of a downwardAPI volume.
    pub(super) fn downward_api(
        &self,
        items: &'a [DownwardAPIVolumeFile],
        default_mode: Option<i32>,
    ) -> Result<Payload<'a>, Reason> {
        let mut payload = Payload::new();
        let mut errors = Vec::new();
        for item in items {
            match self.downward_value(item) {
                Ok(value) => {
                    let mode = item.mode.map_or_else(|| mode_of(default_mode), |mode| mode_of(Some(mode)));
                    payload.insert(item.path.clone(), file(Cow::Owned(value.into_bytes()), mode));
                }
                Err(error) => errors.push(error),
            }
        }
        Reason::all(errors).map(|()| payload)
    }

    /// Files of a projected volume: those of all its sources, a later source's instead of an earlier one's.
    pub(super) fn projected(&self, source: &'a ProjectedVolumeSource) -> Result<Payload<'a>, Reason> {
        let mut payload = Payload::new();
        let mut errors = Vec::new();
        for projection in source.sources.iter().flatten() {
            match self.projection(projection, source.default_mode) {
                Ok(files) => payload.extend(files),
                Err(error) => errors.push(error),
            }
        }
        Reason::all(errors).map(|()| payload)
    }

    fn projection(&self, from: &'a VolumeProjection, default_mode: Option<i32>) -> Result<Payload<'a>, Reason> {
        if let Some(from) = &from.config_map {
            self.config_map(&from.name, from.items.as_deref(), from.optional, default_mode)
        } else if let Some(from) = &from.secret {
            self.secret(&from.name, from.items.as_deref(), from.optional, default_mode)
        } else if let Some(from) = &from.downward_api {
            self.downward_api(from.items.as_deref().unwrap_or_default(), default_mode)
        } else if let Some(from) = &from.service_account_token {
            self.token(from, default_mode)
        } else if from.cluster_trust_bundle.is_some() {
            Err(Reason::Projection("clusterTrustBundle"))
        } else if from.pod_certificate.is_some() {
            Err(Reason::Projection("podCertificate"))
        } else {
            Err(Reason::Projection("unknown"))
        }
    }

    fn token(&self, from: &'a ServiceAccountTokenProjection, default_mode: Option<i32>) -> Result<Payload<'a>, Reason> {
        let metadata = &self.pod.metadata;
        let audience = from.audience.as_deref().unwrap_or_default();
        let key = token_key(
            metadata.namespace.as_deref().unwrap_or_default(),
            metadata.uid.as_deref().unwrap_or_default(),
            audience,
            from.expiration_seconds.unwrap_or(DEFAULT_TOKEN_SECONDS),
        );
        let token = self.refs.tokens.get(&key).ok_or_else(|| Reason::TokenMissing(audience.to_owned()))?;
        let owner = common_user(self.pod);
        // A token is for the user or the group it is given to, and for nobody else.
        let mode = if owner.is_some() || self.fs_group.is_some() { 0o600 } else { mode_of(default_mode) };
        let file = File { bytes: Cow::Borrowed(token.token.as_bytes()), mode, owner };
        Ok(Payload::from([(from.path.clone(), file)]))
    }

    fn downward_value(&self, item: &DownwardAPIVolumeFile) -> Result<String, Reason> {
        if let Some(field) = &item.field_ref {
            (self.context.field)(&field.field_path).map_err(Reason::Field)
        } else if let Some(resource) = &item.resource_field_ref {
            let container = resource.container_name.as_deref().unwrap_or_default();
            (self.context.resource)(container, &resource.resource, resource.divisor.as_ref()).map_err(Reason::Field)
        } else {
            Err(Reason::Field(format!("item {:?} has neither fieldRef nor resourceFieldRef", item.path)))
        }
    }
}

/// The user that all containers run as, when the pod says so for each of them.
pub(super) fn common_user(pod: &Pod) -> Option<u32> {
    let spec = pod.spec.as_ref()?;
    let of_pod = spec.security_context.as_ref().and_then(|context| context.run_as_user);
    let mut users = spec
        .init_containers
        .iter()
        .flatten()
        .chain(&spec.containers)
        .map(|container| container.security_context.as_ref().and_then(|context| context.run_as_user).or(of_pod));
    let first = users.next()??;
    users.all(|user| user == Some(first)).then(|| u32::try_from(first).ok()).flatten()
}

fn select<'a>(
    selection: &Selection<'a>,
    value: impl Fn(&str) -> Option<&'a [u8]>,
    keys: impl Iterator<Item = &'a String>,
    missing: impl Fn(String) -> Reason,
) -> Result<Payload<'a>, Reason> {
    let mut payload = Payload::new();
    match selection.items.filter(|items| !items.is_empty()) {
        None => {
            for key in keys {
                if let Some(bytes) = value(key) {
                    payload.insert(key.clone(), file(Cow::Borrowed(bytes), selection.mode));
                }
            }
        }
        Some(items) => {
            for item in items {
                match value(&item.key) {
                    Some(bytes) => {
                        let mode = item.mode.map_or(selection.mode, |mode| mode_of(Some(mode)));
                        payload.insert(item.path.clone(), file(Cow::Borrowed(bytes), mode));
                    }
                    None if selection.optional => {}
                    None => return Err(missing(item.key.clone())),
                }
            }
        }
    }
    Ok(payload)
}

fn config_map_value<'a>(object: &'a ConfigMap, key: &str) -> Option<&'a [u8]> {
    let text = object.data.as_ref().and_then(|data| data.get(key)).map(String::as_bytes);
    text.or_else(|| value_in(object.binary_data.as_ref(), key))
}

fn config_map_keys(object: &ConfigMap) -> impl Iterator<Item = &String> {
    let text = object.data.iter().flat_map(BTreeMap::keys);
    text.chain(object.binary_data.iter().flat_map(BTreeMap::keys))
}

fn secret_value<'a>(object: &'a Secret, key: &str) -> Option<&'a [u8]> {
    value_in(object.data.as_ref(), key)
}

fn secret_keys(object: &Secret) -> impl Iterator<Item = &String> {
    object.data.iter().flat_map(BTreeMap::keys)
}

fn value_in<'a>(data: Option<&'a BTreeMap<String, ByteString>>, key: &str) -> Option<&'a [u8]> {
    data.and_then(|data| data.get(key)).map(|value| value.0.as_slice())
}

fn mode_of(mode: Option<i32>) -> u32 {
    mode.and_then(|mode| u32::try_from(mode).ok()).unwrap_or(DEFAULT_MODE) & 0o7777
}

fn file(bytes: Cow<'_, [u8]>, mode: u32) -> File<'_> {
    File { bytes, mode, owner: None }
}
