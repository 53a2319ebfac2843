//! A world whose ranks are threads of several processes, one process a node.
//!
//! The ranks of a mesh are dealt out in order: process 0 has the first ones, process 1 the next, as many each. A group whose
//! ranks are all in one process is one of threads; one over several is [`spanning::NodeRank`]: its ranks in a process meet
//! as threads, and one of them speaks for the others with the other processes, which are a [`SocketGroup`] of their own for
//! every such group. Sums are taken in the order of the ranks all the same, so that a mesh over several processes gives the
//! bits of the same mesh in one.
//!
//! The processes find each other at a rendezvous, and never again: when one is lost the world is lost. A thread of each process
//! looks for that, so that those who wait for somebody else hear of it too.

mod spanning;

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use crate::groups::Bell;
use crate::sockets::nonce;
use crate::threads::{Shared, ThreadRank, group};
use crate::{Collective, Mesh, ParallelError, RankGroups, Result, Single, SocketGroup, SocketOptions, SubMesh};
use spanning::{Between, NodeRank};

/// How often a process looks whether another is gone.
const LOOK: Duration = Duration::from_millis(50);
/// Bytes of a process's addresses for its groups.
const ADDRESSES_BYTES_MAX: usize = 1 << 20;

/// How a process joins the others of its replica.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// This process, from 0.
    pub node: usize,
    /// How many processes.
    pub nodes: usize,
    /// What all of them know and nobody else; at least 16 bytes.
    pub token: Vec<u8>,
    /// How long they may take to come together.
    pub connect_ms_max: u64,
    /// How long a collective may wait.
    pub wait_ms_max: u64,
}

/// Where processes meet.
#[derive(Debug)]
pub enum Rendezvous {
    /// The first process waits for the others.
    Listen(TcpListener),
    /// The others connect to it, at host and port.
    Connect(String),
}

/// The processes of a replica, connected.
pub struct NodeWorld {
    options: NodeOptions,
    control: Arc<SocketGroup>,
    alarm: Arc<Alarm>,
    /// What the watching thread looks at; it ends with this.
    watched: OnceLock<Arc<Watched>>,
}

/// Tells everybody in this process that the world is lost.
#[derive(Debug, Default)]
pub(crate) struct Alarm {
    /// Ends the waits of all connections between the processes.
    failed: Arc<AtomicBool>,
    why: OnceLock<ParallelError>,
    flags: Mutex<Vec<Weak<AtomicBool>>>,
}

impl Alarm {
    fn ring(&self, error: &ParallelError) {
        self.why.get_or_init(|| error.clone());
        self.failed.store(true, Ordering::Release);
        let flags = self.flags.lock().unwrap_or_else(PoisonError::into_inner);
        flags.iter().filter_map(Weak::upgrade).for_each(|flag| flag.store(true, Ordering::Release));
    }

    fn why(&self) -> Option<ParallelError> {
        self.why.get().cloned()
    }
}

struct Watched {
    control: Arc<SocketGroup>,
    betweens: Vec<Arc<Between>>,
    /// The ranks of this process; all its groups of threads stand with it.
    local: Arc<Shared>,
    first_rank: usize,
    per_node: usize,
    alarm: Arc<Alarm>,
}

impl Watched {
    fn trouble(&self) -> Option<ParallelError> {
        let control = || Some(of_processes(self.control.lost()?, |node| (node, self.ranks_of(node))));
        let between = || self.betweens.iter().find_map(|between| between.lost());
        // One that has said why it gives up is heard before its connections end.
        self.local.broken().or_else(between).or_else(control)
    }

    fn ranks_of(&self, node: usize) -> (usize, usize) {
        (node * self.per_node, (node + 1) * self.per_node - 1)
    }

    /// Looks until the world is lost or no longer wanted.
    fn watch(this: &Weak<Watched>) {
        loop {
            std::thread::sleep(LOOK);
            let Some(watched) = this.upgrade() else { return };
            if let Some(error) = watched.trouble() {
                watched.ring(&error);
                return;
            }
        }
    }
}

impl Bell for Watched {
    fn ring(&self, error: &ParallelError) {
        self.alarm.ring(error);
        self.local.fail_all(self.first_rank, error);
        self.betweens.iter().for_each(|between| between.group.abort(error));
    }
}

/// An error of a group of processes, in whose words a rank is a process. `who` knows, of a place in the group, the process and
/// its first and last rank.
fn of_processes(error: ParallelError, who: impl Fn(usize) -> (usize, (usize, usize))) -> ParallelError {
    match error {
        ParallelError::Lost { operation, rank, address, reason } => {
            let (process, (first_rank, last_rank)) = who(rank);
            ParallelError::LostProcess { operation, process, first_rank, last_rank, address, reason }
        }
        ParallelError::Missing { operation, missing, waited_ms } => {
            let named = |name: String| {
                let rest = name.strip_prefix("rank ").unwrap_or_default();
                let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
                match rest[..digits].parse::<usize>() {
                    Ok(place) => format!("process {}{}", who(place).0, &rest[digits..]),
                    Err(_) => name,
                }
            };
            let missing = missing.into_iter().map(named).collect();
            ParallelError::Missing { operation, missing, waited_ms }
        }
        other => other,
    }
}

/// A group of ranks that several processes have a part in.
struct Span {
    /// Its number among all groups of the mesh, the same in every process.
    number: u64,
    sub: SubMesh,
    members: Vec<usize>,
    /// The processes, in order, and how many of the members each has.
    processes: Vec<usize>,
    counts: Vec<usize>,
}

impl NodeWorld {
    /// Waits until all processes have come to the rendezvous.
    ///
    /// # Errors
    /// [`ParallelError::Missing`] with the processes that did not come; those of [`SocketGroup`].
    pub fn meet(rendezvous: Rendezvous, options: NodeOptions) -> Result<NodeWorld> {
        let sockets = SocketOptions {
            rank: options.node,
            world: options.nodes,
            token: options.token.clone(),
            attempt: 0,
            connect_ms_max: options.connect_ms_max,
            wait_ms_max: options.wait_ms_max,
            // Whoever waits here waits for the processes themselves, whose end is seen.
            stop: None,
        };
        let control = match rendezvous {
            Rendezvous::Listen(listener) => SocketGroup::listen(listener, &sockets),
            Rendezvous::Connect(address) => SocketGroup::connect(&address, &sockets),
        };
        let control = control.map_err(|error| of_processes(error, |node| (node, (node, node))))?;
        Ok(NodeWorld {
            options,
            control: Arc::new(control),
            alarm: Arc::new(Alarm::default()),
            watched: OnceLock::new(),
        })
    }

    /// This process, from 0.
    pub fn node(&self) -> usize {
        self.options.node
    }

    /// How many processes there are.
    pub fn nodes(&self) -> usize {
        self.options.nodes
    }

    /// Every process gets what all of them bring, by process; at most `bytes_max` each. All must call it equally often, one
    /// call at a time.
    ///
    /// # Errors
    /// A process that is gone or late; [`ParallelError::TooLarge`].
    pub fn exchange(&self, mine: &[u8], bytes_max: usize) -> Result<Vec<Vec<u8>>> {
        let told = self.control.all_gather_bytes(mine, bytes_max);
        told.map_err(|error| of_processes(error, |node| (node, self.ranks_of(node))))
    }

    /// Why the world is lost, if it is.
    pub fn lost(&self) -> Option<ParallelError> {
        let control = || Some(of_processes(self.control.lost()?, |node| (node, self.ranks_of(node))));
        self.alarm.why().or_else(control)
    }

    /// Lets every group of the world fail, here and in the other processes.
    pub fn fail(&self, reason: impl std::fmt::Display) {
        let error = ParallelError::Failed { rank: self.ranks_of(self.node()).0, reason: reason.to_string() };
        match self.watched.get() {
            Some(watched) => watched.ring(&error),
            None => self.alarm.ring(&error),
        }
    }

    /// `flag` is set when the world is lost, so that whoever waits for somebody else by it does not wait on.
    pub fn set_when_lost(&self, flag: &Arc<AtomicBool>) {
        let mut flags = self.alarm.flags.lock().unwrap_or_else(PoisonError::into_inner);
        flags.retain(|flag| flag.strong_count() > 0);
        flags.push(Arc::downgrade(flag));
        drop(flags);
        if self.alarm.why().is_some() {
            flag.store(true, Ordering::Release);
        }
    }

    fn ranks_of(&self, node: usize) -> (usize, usize) {
        self.watched.get().map_or((node, node), |watched| watched.ranks_of(node))
    }

    /// The groups of this process's ranks of `mesh`, in their order; give each to its thread. Once for a world.
    ///
    /// # Errors
    /// A mesh whose ranks cannot be dealt out evenly; a process that does not come.
    pub fn ranks(&self, mesh: Mesh) -> Result<Vec<RankGroups>> {
        let NodeOptions { node, nodes, wait_ms_max, .. } = self.options;
        let bad = |reason: String| ParallelError::BadGroup { reason };
        if !mesh.world().is_multiple_of(nodes) {
            return Err(bad(format!("{} ranks cannot be dealt out evenly to {nodes} processes", mesh.world())));
        }
        if self.watched.get().is_some() {
            return Err(bad("its ranks were made before".into()));
        }
        let per_node = mesh.world() / nodes;
        let own = node * per_node..(node + 1) * per_node;
        let betweens = self.connect(spans(&mesh, per_node), per_node)?;
        let mut handles: Vec<Vec<Arc<dyn Collective>>> = own.clone().map(|_| Vec::new()).collect();
        let (mut shared, mut betweens_left) = (Vec::new(), betweens.iter());
        for sub in SubMesh::ALL {
            for members in mesh.groups(sub) {
                let here: Vec<usize> = members.iter().copied().filter(|rank| own.contains(rank)).collect();
                if here.is_empty() {
                    continue;
                }
                if let [alone] = members[..] {
                    handles[alone - own.start].push(Arc::new(Single));
                    continue;
                }
                // The ranks that wait for the one that speaks for them hear from it first.
                let spans = here.len() < members.len();
                let patience = if spans { wait_ms_max.saturating_mul(2) } else { wait_ms_max };
                let between = if spans { betweens_left.next() } else { None };
                for (rank, local) in here.iter().zip(group(here.clone(), patience)) {
                    shared.push(local.shared().clone());
                    let handle: Arc<dyn Collective> = match between {
                        Some(between) => Arc::new(NodeRank::new(local, Arc::clone(between))),
                        None => Arc::new(local),
                    };
                    handles[rank - own.start].push(handle);
                }
            }
        }
        let locals: Vec<Arc<ThreadRank>> =
            group(own.clone().collect(), wait_ms_max).into_iter().map(Arc::new).collect();
        let Some(local) = locals.first().map(|rank| rank.shared().clone()) else {
            return Err(bad("a process without a rank".into()));
        };
        shared.push(local.clone());
        shared.dedup_by(|a, b| Arc::ptr_eq(a, b));
        for group in &shared {
            group.stand_with(shared.iter().map(Arc::downgrade).collect());
        }
        let watched = Watched {
            control: Arc::clone(&self.control),
            betweens,
            local,
            first_rank: own.start,
            per_node,
            alarm: Arc::clone(&self.alarm),
        };
        let watched = self.watched.get_or_init(|| Arc::new(watched));
        let looked_at = Arc::downgrade(watched);
        let spawned = std::thread::Builder::new().name("replica".into()).spawn(move || Watched::watch(&looked_at));
        spawned.map_err(|error| bad(format!("no thread can be started: {error}")))?;
        let bell: Weak<dyn Bell> = Arc::downgrade(watched) as Weak<dyn Bell>;
        let ranks = own.zip(handles).zip(locals);
        ranks.map(|((rank, groups), local)| RankGroups::of_node(rank, mesh, groups, local, bell.clone())).collect()
    }

    /// Connects this process with the others of every group that spans several, in the same order everywhere.
    fn connect(&self, spans: Vec<Span>, per_node: usize) -> Result<Vec<Arc<Between>>> {
        let NodeOptions { node, connect_ms_max, wait_ms_max, .. } = self.options;
        let bad = |reason: String| ParallelError::BadGroup { reason };
        let mine: Vec<Span> = spans.into_iter().filter(|span| span.processes.contains(&node)).collect();
        let mut listeners = std::collections::BTreeMap::new();
        // A secret of this world alone, then a number and a port of every group that this process leads.
        let mut told = nonce()?.to_vec();
        for span in mine.iter().filter(|span| span.processes[0] == node) {
            let ip =
                self.control.own_ip(span.processes[1]).ok_or_else(|| bad("no way to the other processes".into()))?;
            let listening = TcpListener::bind((ip, 0)).and_then(|l| Ok((l.local_addr()?.port(), l)));
            let (port, listener) = listening.map_err(|error| bad(format!("cannot listen at {ip}: {error}")))?;
            told.extend_from_slice(&span.number.to_le_bytes());
            told.extend_from_slice(&port.to_le_bytes());
            listeners.insert(span.number, listener);
        }
        let all = self.exchange(&told, ADDRESSES_BYTES_MAX)?;
        let token = all.first().and_then(|told| told.get(..nonce_len())).unwrap_or_default().to_vec();
        mine.into_iter()
            .map(|span| {
                let place = span.processes.iter().position(|process| *process == node).unwrap_or_default();
                let options = SocketOptions {
                    rank: place,
                    world: span.processes.len(),
                    token: token.clone(),
                    attempt: span.number,
                    connect_ms_max,
                    wait_ms_max,
                    stop: Some(Arc::clone(&self.alarm.failed)),
                };
                let connected = match listeners.remove(&span.number) {
                    Some(listener) => SocketGroup::listen(listener, &options),
                    None => {
                        let leader = span.processes[0];
                        let address = self.control.address_of(leader).map(|address| address.ip());
                        let address = address.and_then(|ip| address_in(&all[leader], ip, span.number));
                        let address = address.ok_or_else(|| bad(format!("process {leader} leads another mesh")))?;
                        SocketGroup::connect(&address.to_string(), &options)
                    }
                };
                let who = |place: usize| {
                    let process = span.processes.get(place).copied().unwrap_or(place);
                    (process, (process * per_node, (process + 1) * per_node - 1))
                };
                let group = connected.map_err(|error| of_processes(error, who))?;
                Ok(Arc::new(Between::new(group, &span, per_node, Arc::clone(&self.alarm))))
            })
            .collect()
    }
}

/// The groups of a mesh that several processes of `per_node` ranks have a part in.
fn spans(mesh: &Mesh, per_node: usize) -> Vec<Span> {
    let all = SubMesh::ALL.into_iter().flat_map(|sub| mesh.groups(sub).into_iter().map(move |members| (sub, members)));
    let span = |(number, (sub, members)): (usize, (SubMesh, Vec<usize>))| {
        let mut processes: Vec<usize> = members.iter().map(|rank| rank / per_node).collect();
        processes.dedup();
        let of = |process: &usize| members.iter().filter(|rank| *rank / per_node == *process).count();
        let counts = processes.iter().map(of).collect();
        (processes.len() > 1).then_some(Span { number: number as u64, sub, members, processes, counts })
    };
    all.enumerate().filter_map(span).collect()
}

const fn nonce_len() -> usize {
    32
}

/// Where the leader of a group listens, in what it has told.
fn address_in(told: &[u8], ip: IpAddr, number: u64) -> Option<SocketAddr> {
    let entries = told.get(nonce_len()..)?.chunks_exact(10);
    let mut ports = entries.filter(|entry| entry[..8] == number.to_le_bytes());
    ports.next().map(|entry| SocketAddr::new(ip, u16::from_le_bytes([entry[8], entry[9]])))
}

#[cfg(test)]
mod tests;
