//! A pod's resolver settings. They go to the runtime in CRI's `DNSConfig`; the runtime writes the file.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use k8s_openapi::api::core::v1::{Pod, PodDNSConfigOption};
use skerry_proto::cri::DnsConfig;

use crate::kubelet::field::Identity;
use crate::kubelet::references::{NodeFacts, PodEvent};

const MOST_NAMESERVERS: usize = 3;
const MOST_SEARCHES: usize = 32;
const LONGEST_SEARCH_LINE: usize = 2048;
/// Some resolvers abort on a longer search path.
const LONGEST_SEARCH: usize = 253;

/// Content of the node's resolv.conf as pods can use it: where only stubs on the box itself are listed, which a pod does not reach, what
/// systemd-resolved asks stands in for them, as with kubeadm.
pub fn read_resolv_conf(etc: &Path, resolved: &Path) -> String {
    let listed = fs::read_to_string(etc).unwrap_or_default();
    let is_stub = |server: &String| server.parse().is_ok_and(|address: IpAddr| address.is_loopback());
    if !parse(&listed).servers.iter().all(is_stub) {
        return listed;
    }
    fs::read_to_string(resolved).unwrap_or(listed)
}

/// The settings of a pod, with the events to record: what had to be left out, or that there is no cluster DNS.
///
/// `host_resolv_conf` is the content of the node's resolv.conf.
pub fn pod_dns(pod: &Pod, node: &NodeFacts, host_resolv_conf: &str) -> (DnsConfig, Vec<PodEvent>) {
    let mut events = Vec::new();
    let spec = pod.spec.as_ref();
    let host_network = spec.is_some_and(|spec| spec.host_network == Some(true));
    let cluster = match spec.and_then(|spec| spec.dns_policy.as_deref()) {
        Some("None") => None,
        Some("Default") => Some(false),
        Some("ClusterFirstWithHostNet") => Some(true),
        _ => Some(!host_network),
    };
    let mut dns = match cluster {
        None => DnsConfig::default(),
        Some(true) if !node.settings.cluster_dns.is_empty() => cluster_first(pod, node, parse(host_resolv_conf)),
        Some(wanted) => {
            if wanted {
                events.push(warning(
                    "MissingClusterDNS",
                    format!(
                        "pod: \"{}\". kubelet does not have ClusterDNS IP configured and cannot create Pod using \"ClusterFirst\" policy. \
                         Falling back to \"Default\" policy.",
                        Identity::of(pod)
                    ),
                ));
            }
            parse(host_resolv_conf)
        }
    };
    if let Some(own) = spec.and_then(|spec| spec.dns_config.as_ref()) {
        dns.servers.extend(own.nameservers.iter().flatten().cloned());
        dns.searches.extend(own.searches.iter().flatten().cloned());
        dns.servers = without_duplicates(dns.servers);
        dns.searches = without_duplicates(dns.searches);
        merge_options(&mut dns.options, own.options.as_deref().unwrap_or_default());
    }
    fit(&mut dns, &mut events);
    (dns, events)
}

fn cluster_first(pod: &Pod, node: &NodeFacts, host: DnsConfig) -> DnsConfig {
    let domain = &node.settings.cluster_domain;
    let mut searches = Vec::new();
    if !domain.is_empty() {
        let namespace = Identity::of(pod).namespace;
        searches = vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.clone()];
    }
    searches.extend(host.searches);
    DnsConfig {
        servers: node.settings.cluster_dns.clone(),
        searches: without_duplicates(searches),
        options: vec!["ndots:5".to_owned()],
    }
}

/// Reads a resolv.conf: nameservers and options gather, the last search line counts.
fn parse(content: &str) -> DnsConfig {
    let mut dns = DnsConfig::default();
    for line in content.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => dns.servers.extend(words.next().map(str::to_owned)),
            Some("search") => {
                let searches = words.filter(|search| *search != ".");
                dns.searches = searches.map(|search| search.strip_suffix('.').unwrap_or(search).to_owned()).collect();
            }
            Some("options") => words.for_each(|option| set_option(&mut dns.options, option)),
            _ => {}
        }
    }
    dns
}

fn merge_options(options: &mut Vec<String>, own: &[PodDNSConfigOption]) {
    for option in own {
        let name = option.name.as_deref().unwrap_or_default();
        match option.value.as_deref() {
            Some(value) if !value.is_empty() => set_option(options, &format!("{name}:{value}")),
            _ => set_option(options, name),
        }
    }
}

/// Replaces the option of the same name, or adds it.
fn set_option(options: &mut Vec<String>, option: &str) {
    let name = |option: &str| option.split_once(':').map_or(option, |(name, _)| name).to_owned();
    match options.iter_mut().find(|existing| name(existing) == name(option)) {
        Some(existing) => option.clone_into(existing),
        None => options.push(option.to_owned()),
    }
}

fn without_duplicates(list: Vec<String>) -> Vec<String> {
    let mut seen = std::collections::BTreeSet::new();
    list.into_iter().filter(|entry| seen.insert(entry.clone())).collect()
}

/// Cuts what resolvers do not read.
fn fit(dns: &mut DnsConfig, events: &mut Vec<PodEvent>) {
    if dns.servers.len() > MOST_NAMESERVERS {
        dns.servers.truncate(MOST_NAMESERVERS);
        events.push(warning(
            "DNSConfigForming",
            format!(
                "Nameserver limits were exceeded, some nameservers have been omitted, the applied nameserver line is: {}",
                dns.servers.join(" ")
            ),
        ));
    }
    let before = dns.searches.len();
    dns.searches.truncate(MOST_SEARCHES);
    dns.searches.retain(|search| search.len() <= LONGEST_SEARCH);
    let mut length = 0;
    let fitting = dns.searches.iter().take_while(|search| {
        length += search.len() + usize::from(length > 0);
        length <= LONGEST_SEARCH_LINE
    });
    let fitting = fitting.count();
    dns.searches.truncate(fitting);
    if dns.searches.len() < before {
        events.push(warning(
            "DNSConfigForming",
            format!(
                "Search Line limits were exceeded, some search paths have been omitted, the applied search line is: {}",
                dns.searches.join(" ")
            ),
        ));
    }
}

fn warning(reason: &'static str, message: String) -> PodEvent {
    PodEvent { warning: true, reason, message, field_path: None }
}

#[cfg(test)]
#[expect(clippy::needless_pass_by_value, reason = "a literal in a call reads best without a reference")]
mod tests;
