//! The environment of a container: service variables, `envFrom`, `env`, in this order; a later one replaces an earlier one.
//!
//! Everything is answered from what the store holds. What a variable needs and the store does not have is an error, never an empty value,
//! unless the reference is optional.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, EnvVarSource, Pod, Service, ServicePort, ServiceSpec};

use crate::kubelet::container_config::ConfigError;
use crate::kubelet::expand::expand;
use crate::kubelet::field::{self, FieldContext, Identity};
use crate::kubelet::references::{NodeFacts, References};

/// The variables of a container, sorted by name.
///
/// `pod_ips` are the sandbox's, primary first; the node's for host network. A secret's value that is not UTF-8 is shown with replacement
/// characters, as every runtime does that passes it on in an OCI spec.
pub fn environment(
    pod: &Pod,
    container: &Container,
    references: &References,
    node: &NodeFacts,
    pod_ips: &[IpAddr],
) -> Result<Vec<(String, String)>, ConfigError> {
    let sources = Sources { pod, container, references, node, pod_ips };
    let services = sources.service_variables()?;
    let mut variables = sources.whole_objects()?;
    for variable in container.env.iter().flatten() {
        let literal = variable.value.as_deref().unwrap_or_default();
        let value = match &variable.value_from {
            Some(source) if literal.is_empty() => match sources.resolve(&variable.name, source)? {
                Some(value) => value,
                None => continue,
            },
            _ => expand(literal, |name| variables.get(name).or_else(|| services.get(name)).map(String::as_str)),
        };
        variables.insert(variable.name.clone(), value);
    }
    let mut all = services;
    all.extend(variables);
    // The kernel ends a variable at the first NUL, so such a value can never arrive whole.
    match all.iter().find(|(name, value)| name.contains('\0') || value.contains('\0')) {
        Some((name, _)) => Err(ConfigError::NulInVariable(name.replace('\0', "\\0"))),
        None => Ok(all.into_iter().collect()),
    }
}

struct Sources<'a> {
    pod: &'a Pod,
    container: &'a Container,
    references: &'a References,
    node: &'a NodeFacts,
    pod_ips: &'a [IpAddr],
}

impl Sources<'_> {
    fn service_variables(&self) -> Result<BTreeMap<String, String>, ConfigError> {
        let namespace = Identity::of(self.pod).namespace;
        let spec = self.pod.spec.as_ref();
        let linked = spec.and_then(|spec| spec.enable_service_links).unwrap_or(true);
        let is_api =
            |service: &Service| is_in(service, "default") && service.metadata.name.as_deref() == Some("kubernetes");
        // Every in-cluster client finds the API by these variables: a container that started before the Service arrived would never
        // find it.
        if !field::is_static(self.pod) && !self.references.services.iter().any(is_api) {
            return Err(ConfigError::ServicesUnknown);
        }
        // By name: a Service `kubernetes` of the pod's own namespace replaces the one of `default`.
        let mut chosen = BTreeMap::new();
        let own = |service: &&Service| linked && is_in(service, namespace);
        let api = self.references.services.iter().filter(|service| is_api(service));
        for service in api.chain(self.references.services.iter().filter(own)) {
            if let Some(entry) = service.spec.as_ref().and_then(|spec| addressed(service, spec)) {
                chosen.insert(entry.name, entry);
            }
        }
        let mut variables = BTreeMap::new();
        chosen.values().for_each(|service| service.add_variables(&mut variables));
        Ok(variables)
    }

    fn whole_objects(&self) -> Result<BTreeMap<String, String>, ConfigError> {
        let mut variables = BTreeMap::new();
        for source in self.container.env_from.iter().flatten() {
            let prefix = source.prefix.as_deref().unwrap_or_default();
            if let Some(reference) = &source.config_map_ref {
                match self.references.config_maps.get(&reference.name) {
                    Some(object) => variables.extend(
                        object.data.iter().flatten().map(|(key, value)| (format!("{prefix}{key}"), value.clone())),
                    ),
                    None if reference.optional == Some(true) => {}
                    None => return Err(ConfigError::ConfigMapNotFound(reference.name.clone())),
                }
            } else if let Some(reference) = &source.secret_ref {
                match self.references.secrets.get(&reference.name) {
                    Some(object) => variables.extend(
                        object.data.iter().flatten().map(|(key, value)| (format!("{prefix}{key}"), text(&value.0))),
                    ),
                    None if reference.optional == Some(true) => {}
                    None => return Err(ConfigError::SecretNotFound(reference.name.clone())),
                }
            }
        }
        Ok(variables)
    }

    /// The value of a variable's source; `None` if it is optional and missing.
    fn resolve(&self, variable: &str, source: &EnvVarSource) -> Result<Option<String>, ConfigError> {
        let missing_key = |kind, key: &str, name: &str| ConfigError::KeyNotFound {
            key: key.to_owned(),
            kind,
            namespace: Identity::of(self.pod).namespace.to_owned(),
            name: name.to_owned(),
        };
        if let Some(reference) = &source.field_ref {
            let context = FieldContext::new(self.node, self.pod_ips);
            return Ok(Some(field::value(self.pod, &reference.field_path, &context)?));
        }
        if let Some(reference) = &source.resource_field_ref {
            let named = reference.container_name.as_deref().filter(|name| !name.is_empty());
            let container = named.unwrap_or(&self.container.name);
            let divisor = reference.divisor.as_ref();
            let value = field::resource_value(self.pod, container, &reference.resource, divisor, self.node)?;
            return Ok(Some(value));
        }
        if let Some(reference) = &source.config_map_key_ref {
            let found = match self.references.config_maps.get(&reference.name) {
                Some(object) => object
                    .data
                    .as_ref()
                    .and_then(|data| data.get(&reference.key).cloned())
                    .ok_or_else(|| missing_key("ConfigMap", &reference.key, &reference.name)),
                None => Err(ConfigError::ConfigMapNotFound(reference.name.clone())),
            };
            return unless_optional(found, reference.optional);
        }
        if let Some(reference) = &source.secret_key_ref {
            let found = match self.references.secrets.get(&reference.name) {
                Some(object) => object
                    .data
                    .as_ref()
                    .and_then(|data| data.get(&reference.key).map(|value| text(&value.0)))
                    .ok_or_else(|| missing_key("Secret", &reference.key, &reference.name)),
                None => Err(ConfigError::SecretNotFound(reference.name.clone())),
            };
            return unless_optional(found, reference.optional);
        }
        if source.file_key_ref.is_some() {
            return Err(ConfigError::FileKeyRef(variable.to_owned()));
        }
        Ok(Some(String::new()))
    }
}

fn unless_optional(found: Result<String, ConfigError>, optional: Option<bool>) -> Result<Option<String>, ConfigError> {
    match found {
        Err(_) if optional == Some(true) => Ok(None),
        other => other.map(Some),
    }
}

fn is_in(service: &Service, namespace: &str) -> bool {
    service.metadata.namespace.as_deref() == Some(namespace)
}

/// A service with an address of its own.
struct Addressed<'s> {
    name: &'s str,
    ip: &'s str,
    ports: &'s [ServicePort],
}

fn addressed<'s>(service: &'s Service, spec: &'s ServiceSpec) -> Option<Addressed<'s>> {
    let ip = spec.cluster_ip.as_deref().filter(|ip| !ip.is_empty() && *ip != "None")?;
    Some(Addressed { name: service.metadata.name.as_deref()?, ip, ports: spec.ports.as_deref().unwrap_or_default() })
}

impl Addressed<'_> {
    fn add_variables(&self, variables: &mut BTreeMap<String, String>) {
        let prefix = variable_name(self.name);
        let address = if self.ip.contains(':') { format!("[{}]", self.ip) } else { self.ip.to_owned() };
        variables.insert(format!("{prefix}_SERVICE_HOST"), self.ip.to_owned());
        for (index, port) in self.ports.iter().enumerate() {
            let number = port.port;
            let protocol = port.protocol.as_deref().filter(|protocol| !protocol.is_empty()).unwrap_or("TCP");
            let scheme = protocol.to_ascii_lowercase();
            let url = format!("{scheme}://{address}:{number}");
            if index == 0 {
                variables.insert(format!("{prefix}_SERVICE_PORT"), number.to_string());
                variables.insert(format!("{prefix}_PORT"), url.clone());
            }
            if let Some(name) = port.name.as_deref().filter(|name| !name.is_empty()) {
                variables.insert(format!("{prefix}_SERVICE_PORT_{}", variable_name(name)), number.to_string());
            }
            let link = format!("{prefix}_PORT_{number}_{}", protocol.to_ascii_uppercase());
            variables.insert(format!("{link}_PROTO"), scheme);
            variables.insert(format!("{link}_PORT"), number.to_string());
            variables.insert(format!("{link}_ADDR"), self.ip.to_owned());
            variables.insert(link, url);
        }
    }
}

fn variable_name(name: &str) -> String {
    name.to_uppercase().replace('-', "_")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
#[expect(clippy::needless_pass_by_value, reason = "a literal in a call reads best without a reference")]
mod tests;
