//! The datapath in the kernel: programs, links and tables, pinned so that they outlive the controller.
//!
//! The only module that names aya. It owns the pins of one interface ([`pin`]), the object and its loading ([`loader`]), the
//! tables ([`tables`]), the links ([`links`]) and the counters ([`counters`]); it decides nothing about services.

mod access;
mod batch;
mod connections;
mod counters;
mod dry_run;
mod error;
mod fault;
mod features;
mod foreign;
mod idle;
mod inner_ranges;
mod journal;
mod links;
mod loader;
mod map_spec;
mod memory;
mod object;
mod pin;
mod pool;
mod stand_ins;
mod sys;
mod tables;
mod tools;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Read as _,
    path::Path,
};

use access::AccessLists;
use aya::{
    Ebpf,
    programs::{Program, ProgramError, SchedClassifier},
};
use connections::Clock;
pub use connections::{Collection, Seen};
pub use counters::{Counters, OutcomeCount};
pub use dry_run::{DryRun, Ran, Verdict};
pub use error::{DatapathError, Hint};
pub use features::{Features, release};
pub use foreign::{Loaded, loaded, own};
pub use inner_ranges::InnerRanges;
use journal::{Journal, Place};
use lb_common::{
    abi::{ABI_VERSION, Config, DENIES, Mode, TC_ALONE, XDP_FRAGS, program, table},
    access::LAST_SERVICE,
    backend::Backend,
    conntrack::{
        Phase, Timers,
        hash::HashKeys,
        line::WAYS,
        table::{EXCHANGE, HALF_OPEN, KEPT, Longest, ONE_SIDED, OVER},
    },
    guard::HOLD_SECONDS,
    outcome::Outcome,
    stats::{BackendStats, Open},
};
pub use links::{AttachProblem, TcHook};
use loader::On;
pub use loader::{ConnectionLog, Programs, would_adopt};
pub use map_spec::Sizes;
pub use object::{ProgramFacts, is_embedded, program_facts};
pub use pin::{Lock, PinDir, attached_interfaces, netns_cookie, pinned_namespaces, remove_abandoned};
pub use pool::{Alias, Translations};
pub use tables::{Drains, TableSet, Vlans, kept_secret};
pub use tools::Tools;

use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    cluster::Idle,
    net::Reset,
    plan::{Limits, MapOp, Role, Tables},
    report::{SourceReport, Trouble},
    translation::Pool,
    tunnel_key::Secret,
};

/// Collections in which connections are looked for whose client may no longer connect, after the last change and the last find:
/// another node may follow later, and forward until then.
const ACCESS_LOOKS: u32 = 10;

/// What the flood guard is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuardState {
    /// Whether it places new connections now.
    pub on: bool,
    /// How often it has taken over.
    pub switches: u32,
    /// Connections it has placed without an entry.
    pub placed: u64,
}

impl Role {
    /// Where its programs go on an interface; the one where frames come in is the last.
    fn places(self, interface: &str, ifindex: u32, uplink: u32) -> Vec<Place> {
        let place = |program, link| Place { interface: interface.to_owned(), link, uplink, program };
        let link = self.link(ifindex);
        match self {
            Self::Tasks => vec![place(program::TASK_TC, link)],
            Self::Translated => vec![place(program::TASK_EGRESS, link)],
            Self::Peers => vec![
                place(program::UPLINK_EGRESS, format!("{}{ifindex}", pin::PEER_EGRESS)),
                place(program::PEER_TC, link),
            ],
        }
    }
}

/// The datapath of one interface, in the hands of its controller.
///
/// What is done between [`Self::open`] and [`Self::commit`] is done as a whole: dropped before, it is undone, and what
/// was there runs on as it was.
pub struct Datapath {
    pins: PinDir,
    _lock: Lock,
    ebpf: Ebpf,
    set: TableSet,
    /// What the tables say, kept in step.
    tables: Tables,
    config: Config,
    /// In how many collections connections are looked for whose client may no longer connect.
    access_looks: u32,
    /// What ranges of addresses are to the node, once it was written.
    inner_ranges: Option<InnerRanges>,
    /// The VLANs on the uplink, once they were written.
    vlans: Option<Vlans>,
    adopted: bool,
    /// What was done to links and filters, and can be undone.
    journal: Journal,
    /// The interfaces that were given a clsact qdisc by what was undone.
    qdiscs: Vec<String>,
    /// The configuration as it was found; none once there is no way back.
    found: Option<Config>,
    /// Interface and mode of the uplink's links, as far as they are known to be there.
    attached: Option<(u32, Mode)>,
    hook: TcHook,
    features: Features,
    /// Programs of this controller that are pinned.
    pinned: BTreeSet<&'static str>,
    /// What the kernel said of programs that it refused when they were needed first: it is not asked again.
    refused: BTreeMap<&'static str, AttachProblem>,
    /// Interfaces that carry programs by filters, which have no pins.
    filtered: BTreeSet<(Role, u32)>,
}

impl Datapath {
    /// Takes hold of an interface's datapath: adopts what is pinned, or loads it anew. Nothing is attached yet.
    ///
    /// # Errors
    /// Another controller holds it; what is pinned does not fit; the kernel refuses. What was there stays.
    pub fn open(interface: &str, sizes: &Sizes, log: ConnectionLog) -> Result<Self, DatapathError> {
        if !is_embedded() {
            return Err(DatapathError::NoObject);
        }
        let features = Features::find()?;
        let pins = PinDir::of(interface)?;
        let lock = pins.hold()?;
        let adopted = loader::check_pins(&pins, sizes)?;
        let opened = Self::open_tables(&pins, sizes, log, features, adopted);
        let (Programs(ebpf), set, tables, config) = opened.inspect_err(|_| {
            if !adopted {
                pins.remove_all();
            }
        })?;
        Ok(Self {
            attached: served(&config),
            pins,
            _lock: lock,
            ebpf,
            set,
            tables,
            config,
            // Whoever was here before may not have come to it.
            access_looks: ACCESS_LOOKS,
            inner_ranges: None,
            vlans: None,
            adopted,
            journal: Journal::default(),
            qdiscs: Vec::new(),
            found: Some(config),
            hook: TcHook::Tcx,
            features,
            pinned: BTreeSet::new(),
            refused: BTreeMap::new(),
            filtered: BTreeSet::new(),
        })
    }

    fn open_tables(
        pins: &PinDir,
        sizes: &Sizes,
        log: ConnectionLog,
        features: Features,
        adopted: bool,
    ) -> Result<(Programs, TableSet, Tables, Config), DatapathError> {
        // Those that other nodes' packets come by are swapped with the rest, or nothing is.
        // Where programs are attached by filters nobody knows by which interfaces they come.
        let demanded = [Role::Peers, Role::Translated];
        let all = adopted
            && (!features.tcx || demanded.into_iter().any(|role| !pins.links_beside(role).is_empty()));
        let names = if all { &program::ALL[..] } else { &loader::NEEDED };
        let programs = loader::load(On::Pinned(pins), sizes, log, features, names)?;
        let mut set = TableSet::open(pins)?;
        if !adopted {
            fault::point("say that the tables are whole").map_err(DatapathError::Fault)?;
            // From here on the tables are whole: what is cut short now is adopted by the next attach.
            set.set_config(Config {
                abi_version: ABI_VERSION,
                nonce: random()?,
                hash_keys: HashKeys { words: random()?, multiplier: random::<u64>()? | 1 },
                ..Config::default()
            })?;
        }
        let (tables, config) = (set.read()?, set.config()?);
        Ok((programs, set, tables, config))
    }

    /// Makes what was done final: the programs that run now are those that the next controller may have to put back.
    ///
    /// # Errors
    /// They cannot be pinned; nothing is final.
    pub fn commit(&mut self) -> Result<(), DatapathError> {
        let loaded = |name: &&str| self.ebpf.program(name).is_some_and(loader::is_loaded);
        let names: Vec<&'static str> = program::ALL.into_iter().filter(loaded).collect();
        names.iter().try_for_each(|name| self.pin_next(name))?;
        for name in names {
            self.pins.rename(&self.pins.next_program(name), &self.pins.program(name))?;
            self.pinned.insert(name);
        }
        self.journal.clear();
        self.found = None;
        Ok(())
    }

    /// Undoes what was done since [`Self::open`], if it is not final. The interfaces that were given a clsact qdisc.
    pub fn roll_back(&mut self) -> Vec<String> {
        let Some(found) = self.found.take() else {
            return Vec::new();
        };
        self.qdiscs.extend(links::undo((&self.pins, &mut self.journal), 0));
        let qdiscs = std::mem::take(&mut self.qdiscs);
        if !self.adopted {
            self.pins.remove_all();
            return qdiscs;
        }
        for name in program::ALL {
            self.pins.remove(&self.pins.next_program(name));
        }
        if let Err(error) = self.set.set_config(found) {
            log::warn!("put the configuration back: {error}");
        }
        qdiscs
    }

    /// Loads the programs once more, on the same tables.
    ///
    /// # Errors
    /// The kernel refuses them.
    pub fn load_programs(&self, log: ConnectionLog) -> Result<Programs, DatapathError> {
        let on = On::Pinned(&self.pins);
        loader::load(on, &Sizes::default(), log, self.features, &loader::NEEDED)
    }

    /// Takes other programs in hand, and gives back those that were. What runs is swapped where it is attached next.
    pub fn exchange(&mut self, programs: Programs) -> Programs {
        Programs(std::mem::replace(&mut self.ebpf, programs.0))
    }

    /// Whether a running datapath was adopted.
    pub fn adopted(&self) -> bool {
        self.adopted
    }

    /// What the tables say.
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// How much fits into the tables.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn limits(&self) -> Result<Limits, DatapathError> {
        self.set.limits()
    }

    /// The configuration as the programs know it.
    pub fn config(&self) -> Config {
        self.config
    }

    /// Tells the programs what ranges of addresses are to the node: who says to be inside is refused.
    ///
    /// # Errors
    /// The kernel refuses a read or a write.
    pub fn set_inner_ranges(&mut self, wanted: InnerRanges) -> Result<(), DatapathError> {
        if self.inner_ranges.as_ref() != Some(&wanted) {
            self.set.set_inner_ranges(&wanted)?;
            self.inner_ranges = Some(wanted);
        }
        Ok(())
    }

    /// Has the programs serve frames of these VLANs, of none, and no others.
    ///
    /// # Errors
    /// The kernel refuses a read or a write.
    pub fn set_vlans(&mut self, wanted: Vlans) -> Result<(), DatapathError> {
        if self.vlans.as_ref() != Some(&wanted) {
            self.set.set_vlans(&wanted)?;
            self.vlans = Some(wanted);
        }
        Ok(())
    }

    /// Configures the programs.
    ///
    /// # Errors
    /// The kernel refuses the write.
    pub fn set_config(&mut self, config: Config) -> Result<(), DatapathError> {
        let frags = if self.features.frags { XDP_FRAGS } else { 0 };
        let flags = config.flags & !(XDP_FRAGS | DENIES) | frags | self.denies();
        // What was made with the tables stays as long as they do.
        let Config { nonce, hash_keys, .. } = self.config;
        let longest = self.longest(config.jiffies_per_second);
        let config = Config { abi_version: ABI_VERSION, flags, nonce, hash_keys, longest, ..config };
        self.set.set_config(config)?;
        self.config = config;
        Ok(())
    }

    /// [`DENIES`], if there are clients whom no service takes.
    fn denies(&self) -> u32 {
        if self.tables.denied().next().is_some() { DENIES } else { 0 }
    }

    /// Has tasks that have IPv4 alone know IPv6 clients by addresses of this pool; those of another one are nobody's any more.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn take_pool(&mut self, pool: Pool) -> Result<(), DatapathError> {
        if Pool::of(&self.config) != pool {
            // Nobody is given one meanwhile.
            self.set_config(Config { pool: 0, pool_bits: 0, ..self.config })?;
            self.set.clear_aliases()?;
        }
        Ok(())
    }

    /// The longest timers of all services, by class of a line: what is silent for longer has ended, whosever it is.
    fn longest(&self, jiffies_per_second: u32) -> Longest {
        let mut seconds = Timers::DEFAULT.seconds;
        for service in self.tables.services.values() {
            for (longest, timer) in seconds.iter_mut().zip(service.timers) {
                *longest = timer.max(*longest);
            }
            if service.idle == Idle::Reset {
                seconds[Phase::Established as usize] = Timers::MOST;
            }
        }
        let of = |phase: Phase| seconds[phase as usize].saturating_mul(jiffies_per_second).min(u32::MAX >> 1);
        let mut longest = Longest::default();
        longest.jiffies[KEPT as usize] = of(Phase::Established);
        longest.jiffies[ONE_SIDED as usize] = of(Phase::Established);
        longest.jiffies[EXCHANGE as usize] = of(Phase::Answered);
        longest.jiffies[OVER as usize] = of(Phase::Closing);
        longest.jiffies[HALF_OPEN as usize] = of(Phase::HalfOpen).max(of(Phase::OneWay));
        longest
    }

    /// Lines of the connection table of each family.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn lines(&self) -> Result<u32, DatapathError> {
        Ok(self.set.entries(table::CONNECTIONS4)? * WAYS)
    }

    /// Applies one operation.
    ///
    /// # Errors
    /// The kernel refuses the write; [`Self::tables`] says what stands.
    pub fn apply(&mut self, op: MapOp) -> Result<(), DatapathError> {
        let used = |index: &u32| self.tables.backends.get(index).map(|entry| entry.backend);
        match &op {
            MapOp::SetBackend(index, entry) => self.set.set_backend(*index, entry, used(index).is_none())?,
            MapOp::FreeBackend(index) => {
                let generation = self.tables.generations.get(index).copied().unwrap_or_default();
                self.set.free_backend(*index, Backend { generation, ..Backend::default() })?;
            }
            MapOp::SetService(index, label) => {
                self.set.set_service(*index, label, !self.tables.services.contains_key(index))?;
            }
            other => self.set.apply(other)?,
        }
        if matches!(op, MapOp::SetAccess(..) | MapOp::RemoveAccess(_) | MapOp::SetListener(..)) {
            self.access_looks = ACCESS_LOOKS;
        }
        let of_every_service =
            matches!(&op, MapOp::SetAccess(of, _) | MapOp::RemoveAccess(of) if of.0 > LAST_SERVICE);
        self.tables.apply(op);
        // Asked for each new connection, and only where there is somebody.
        if of_every_service && self.config.flags & DENIES != self.denies() {
            self.set_config(self.config)?;
        }
        Ok(())
    }

    /// Keeps what the controller says of its source, for the verbs.
    ///
    /// # Errors
    /// The kernel refuses the write.
    pub fn set_report(&mut self, report: &SourceReport) -> Result<(), DatapathError> {
        self.set.set_report(report)
    }

    /// Keeps this node's key for the tunnel, for the next controller.
    ///
    /// # Errors
    /// The kernel refuses the write.
    pub fn set_secret(&mut self, secret: &Secret) -> Result<(), DatapathError> {
        self.set.set_secret(secret)
    }

    /// What somebody drains.
    pub fn drains(&self) -> Drains {
        self.set.drains()
    }

    /// The version of what somebody drains.
    pub fn drain_version(&self) -> u64 {
        self.set.drain_version()
    }

    /// What the agent is asked to log, if somebody asked.
    pub fn log_level(&self) -> Option<String> {
        self.set.log_level()
    }

    /// Takes back what was asked of a former agent's log.
    ///
    /// # Errors
    /// The kernel refuses the write.
    pub fn forget_log_level(&mut self) -> Result<(), DatapathError> {
        self.set.set_log_level(None)
    }

    /// The tasks of which it was said that they do not take connections, by the number of their backend.
    ///
    /// # Errors
    /// The kernel refuses a read.
    pub fn troubles(&self) -> Result<BTreeMap<u32, Trouble>, DatapathError> {
        Ok(self.set.troubles(&self.set.counters(&self.tables)?.backends))
    }

    /// Keeps what is wrong with a backend, for the verbs; `None` is nothing.
    ///
    /// # Errors
    /// The kernel refuses the write.
    pub fn set_trouble(&mut self, index: u32, trouble: Option<&Trouble>) -> Result<(), DatapathError> {
        self.set.set_trouble(index, trouble)
    }

    /// Keeps how full the tables of connections are, for the verbs.
    ///
    /// # Errors
    /// The kernel refuses the write.
    pub fn set_fills(&mut self, fills: &BTreeMap<&str, [u64; 2]>) -> Result<(), DatapathError> {
        self.set.set_fills(fills)
    }

    /// The counters of a backend.
    ///
    /// # Errors
    /// The kernel refuses the read.
    pub fn backend_stats(&self, index: u32) -> Result<BackendStats, DatapathError> {
        self.set.backend(index)
    }

    /// The open connections of a backend, as the programs count them.
    ///
    /// # Errors
    /// The kernel refuses the read.
    pub fn counted_open(&self, index: u32) -> Result<Open, DatapathError> {
        self.set.counted_open(index)
    }

    /// What a controller said last of its source.
    pub fn report(&self) -> Option<SourceReport> {
        self.set.report()
    }

    /// Counters of everything.
    ///
    /// # Errors
    /// The kernel refuses a read.
    pub fn counters(&self) -> Result<Counters, DatapathError> {
        self.set.counters(&self.tables)
    }

    /// Attaches the programs of the uplink in this mode, or swaps them where they are attached already.
    ///
    /// # Errors
    /// The kernel refuses; another mode may be tried, or what was done is undone with the rest.
    pub fn attach_uplink(&mut self, interface: &str, ifindex: u32, mode: Mode) -> Result<(), AttachProblem> {
        let mark = self.journal.mark();
        let done = self.try_attach_uplink(interface, ifindex, mode);
        self.conclude(mark, done)?;
        self.attached = Some((ifindex, mode));
        Ok(())
    }

    fn try_attach_uplink(&mut self, interface: &str, ifindex: u32, mode: Mode) -> Result<(), AttachProblem> {
        let journal = &mut self.journal;
        for (program, link) in
            [(program::UPLINK_EGRESS, pin::UPLINK_EGRESS), (program::UPLINK_TC, pin::UPLINK_TC)]
        {
            let tc = classifier(&mut self.ebpf, program)?;
            let place =
                Place { interface: interface.to_owned(), link: link.to_owned(), uplink: ifindex, program };
            self.hook = links::attach_tc((&self.pins, journal), tc, place, self.features.tcx)?;
        }
        if mode == Mode::Tc {
            links::detach_xdp((&self.pins, journal), self.attached);
            return Ok(());
        }
        let xdp = self.ebpf.program_mut(program::UPLINK_XDP).ok_or(ProgramError::NotLoaded)?;
        links::attach_xdp((&self.pins, journal), xdp.try_into()?, ifindex, mode, self.attached)
    }

    /// Attaches the programs of a role to an interface beside the uplink.
    ///
    /// # Errors
    /// The kernel refuses; what was attached before is attached as it was.
    pub fn attach_beside(
        &mut self,
        role: Role,
        (interface, ifindex): (&str, u32),
        uplink: u32,
    ) -> Result<(), AttachProblem> {
        let mark = self.journal.mark();
        let done = self.try_attach_beside(role.places(interface, ifindex, uplink));
        if done.is_err() {
            // One program without the other is nobody's.
            self.qdiscs.extend(links::undo((&self.pins, &mut self.journal), mark));
        }
        if self.conclude(mark, done)? == TcHook::Clsact {
            self.filtered.insert((role, ifindex));
        }
        Ok(())
    }

    fn try_attach_beside(&mut self, places: Vec<Place>) -> Result<TcHook, AttachProblem> {
        let mut hook = self.hook;
        places.iter().try_for_each(|place| self.demand(place.program))?;
        for place in places {
            let program = classifier(&mut self.ebpf, place.program)?;
            hook = links::attach_tc((&self.pins, &mut self.journal), program, place, self.features.tcx)?;
        }
        Ok(hook)
    }

    /// Pins a program beside the one that it is to take the place of.
    fn pin_next(&mut self, name: &'static str) -> Result<(), DatapathError> {
        fault::point("pin a program").map_err(DatapathError::Fault)?;
        let program = self.ebpf.program_mut(name).ok_or(DatapathError::NoProgram(name))?;
        self.pins.replace(&self.pins.next_program(name), |path| program.pin(path))
    }

    /// Undoes what failed. Before [`Self::commit`] it is undone with the rest, or taken up by another mode.
    fn conclude<T>(&mut self, mark: usize, done: Result<T, AttachProblem>) -> Result<T, AttachProblem> {
        if self.found.is_none() {
            if done.is_err() {
                self.qdiscs.extend(links::undo((&self.pins, &mut self.journal), mark));
            }
            self.journal.clear();
        }
        done
    }

    /// Detaches them again; an interface that is gone has taken the links with it.
    pub fn detach_beside(&mut self, role: Role, (interface, ifindex): (Option<&str>, u32), uplink: u32) {
        self.filtered.remove(&(role, ifindex));
        for place in role.places(interface.unwrap_or_default(), ifindex, uplink) {
            links::detach_tc(&self.pins, &place);
        }
    }

    /// The interfaces that carry the programs of a role. Filters of a former controller, which have no pins, are not known; those
    /// for tasks go with their veth.
    pub fn links_beside(&self, role: Role) -> BTreeSet<u32> {
        let filtered = self.filtered.iter().filter(|(of, _)| *of == role).map(|(_, index)| *index);
        self.pins.links_beside(role).into_iter().chain(filtered).collect()
    }

    /// Whether a former controller's programs have this role on the interface: those that cannot be swapped serve on.
    pub fn carries(&self, role: Role, ifindex: u32) -> bool {
        // A filter has no pin. Where somebody is reached, there is one.
        self.links_beside(role).contains(&ifindex)
            || self.adopted && !self.features.tcx && self.tables.leads(role, ifindex)
    }

    /// How the TC programs are attached.
    pub fn tc_hook(&self) -> TcHook {
        self.hook
    }

    /// Takes everything away: links first, so that no program runs on tables that go.
    pub fn remove(mut self, interfaces: &[String]) {
        self.found = None;
        remove(&self.pins, interfaces);
    }

    /// Has the kernel take a program that not every datapath needs, if it has not, and pins it where nothing is undone any more:
    /// what it takes the place of runs nowhere, or is swapped in a moment.
    ///
    /// # Errors
    /// The kernel refuses it, now or when it was asked first.
    pub fn demand(&mut self, name: &'static str) -> Result<(), AttachProblem> {
        if let Some(problem) = self.refused.get(name) {
            return Err(problem.clone());
        }
        if let Err(error) = loader::demand(&mut self.ebpf, name) {
            let refused = matches!(&error, DatapathError::Verify { .. });
            let problem = AttachProblem::from(error);
            if refused {
                self.refused.insert(name, problem.clone());
            }
            return Err(problem);
        }
        if self.found.is_none() && !self.pinned.contains(name) {
            self.pin_next(name)?;
            self.pins.rename(&self.pins.next_program(name), &self.pins.program(name))?;
            self.pinned.insert(name);
        }
        Ok(())
    }

    /// What the kernel knows of the loaded programs.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn programs(&self) -> Result<Vec<ProgramFacts>, DatapathError> {
        let loaded = self.ebpf.programs().filter(|(_, program)| loader::is_loaded(program));
        loaded.map(|(name, program)| program_facts(name, program).map_err(DatapathError::Program)).collect()
    }

    /// How the uplink is served, and on which interface index.
    pub fn attached(&self) -> Option<(u32, Mode)> {
        self.attached
    }

    /// Passes on what the programs log, until the process ends.
    ///
    /// # Errors
    /// The kernel does not let it be read.
    pub fn log_connections(&mut self) -> Result<(), DatapathError> {
        let failed = |what: String| DatapathError::Log(what);
        let logger = aya_log::EbpfLogger::init(&mut self.ebpf).map_err(|error| failed(error.to_string()))?;
        // SAFETY: the logger owns its descriptor, hands out the same one always, and goes with the `AsyncFd`.
        let registered = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) };
        let mut logger = registered.map_err(|error| failed(error.to_string()))?;
        tokio::spawn(async move {
            while let Ok(mut ready) = logger.readable_mut().await {
                ready.get_inner_mut().flush();
                ready.clear_ready();
            }
        });
        Ok(())
    }

    /// The clock of connections: jiffies, low 32 bits.
    ///
    /// # Errors
    /// The kernel does not run the program that tells it.
    pub fn now(&self) -> Result<u32, DatapathError> {
        tools::now(&self.ebpf)
    }

    /// [`TableSet::aliases`].
    ///
    /// # Errors
    /// The table cannot be mapped, or the kernel does not run the program that tells the time.
    pub fn aliases(&self) -> Result<Vec<Alias>, DatapathError> {
        self.set.aliases(self.now()?)
    }

    /// Removes all connections that have ended, and those whose client may no longer connect. The numbers of backends that none
    /// names any more are then free to be given again. The resets for those of them that ask for some go to `resets`, whatever else fails.
    ///
    /// # Errors
    /// The kernel refuses a read, or to run the program that removes.
    pub fn collect(&mut self, resets: &mut Vec<Reset>) -> Result<Collection, DatapathError> {
        let now = self.now()?;
        let resting = self.tables.resting.clone();
        let Config { jiffies_per_second, hash_keys, .. } = &self.config;
        let (tables, jiffies_per_second) = (&self.tables, *jiffies_per_second);
        let access =
            (self.access_looks > 0).then(|| AccessLists::of(tables)).filter(|lists| !lists.is_empty());
        let clock = Clock { tables, access: access.as_ref(), now, jiffies_per_second, hash_keys };
        let collected = self.set.collect(clock, tools::gc(&self.ebpf)?, resets);
        // Who was idle so long has his address until here.
        self.set.send_as_tasks_know((&self.config, &self.tables), now, resets);
        let mut done = collected?;
        done.fills.extend(self.set.collect_aliases(now, &done.translated)?);
        self.access_looks = if done.denied > 0 { ACCESS_LOOKS } else { self.access_looks.saturating_sub(1) };
        for index in resting.difference(&done.named) {
            self.tables.resting.remove(index);
        }
        Ok(done)
    }

    /// Packets that came to an outcome.
    ///
    /// # Errors
    /// The kernel refuses a read.
    pub fn outcome(&self, outcome: Outcome) -> Result<u64, DatapathError> {
        self.set.outcome(outcome)
    }

    /// Tells the programs that the controller is there.
    ///
    /// # Errors
    /// The kernel refuses the write.
    pub fn beat(&mut self) -> Result<(), DatapathError> {
        let now = self.now()?;
        self.set.set_heartbeat(now)?;
        // Services come and go, with timers of their own; and what a write that failed has left behind.
        if self.config.longest != self.longest(self.config.jiffies_per_second)
            || self.config.flags & DENIES != self.denies()
        {
            self.set_config(self.config)?;
        }
        Ok(())
    }

    /// What the flood guard is doing.
    ///
    /// # Errors
    /// The kernel refuses a read.
    pub fn guard(&self) -> Result<GuardState, DatapathError> {
        let (guard, placed) = self.set.guard()?;
        let on = guard.within(HOLD_SECONDS, self.now()?, self.config.jiffies_per_second);
        Ok(GuardState { on, switches: guard.switches, placed })
    }

    /// A loaded program, to run it on packets without a wire.
    pub fn program(&self, name: &str) -> Option<&Program> {
        self.ebpf.program(name)
    }
}

impl Drop for Datapath {
    fn drop(&mut self) {
        self.roll_back();
    }
}

/// Random bytes of the kernel's, as a number or an array of such.
fn random<T: aya::Pod>() -> Result<T, DatapathError> {
    let mut bytes = vec![0; size_of::<T>()];
    let failed = |error| DatapathError::pin("read", "/dev/urandom", error);
    std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).map_err(failed)?;
    // SAFETY: any bytes are a value of plain data, and there are as many as it has.
    Ok(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// The uplink that is served, and how. Where an attach was cut short TC does all, whatever XDP there is.
fn served(config: &Config) -> Option<(u32, Mode)> {
    let mode = Mode::try_from(config.mode).ok()?;
    Some((config.uplink, if config.flags & TC_ALONE != 0 { Mode::Tc } else { mode }))
}

fn classifier<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier, ProgramError> {
    ebpf.program_mut(name).ok_or(ProgramError::NotLoaded)?.try_into()
}

/// Removes the datapath of an interface: links, programs, tables, pins. `interfaces` are those on which a
/// filter without a pin may sit (before TCX).
pub fn remove(pins: &PinDir, interfaces: &[String]) {
    let uplink = TableSet::open(pins).and_then(|set| set.config()).map_or(0, |config| config.uplink);
    links::detach_all(pins, interfaces, uplink);
    pins.remove_all();
}

/// Removes a datapath that nobody controls, whatever its version, once it is known that one of these sizes can be loaded
/// in its place.
///
/// # Errors
/// Another controller holds it, there is no bpffs, or the kernel refuses the new one; then the old one runs on.
pub fn replace(interface: &str, sizes: &Sizes, interfaces: &[String]) -> Result<(), DatapathError> {
    let pins = PinDir::of(interface)?;
    let _lock = pins.hold()?;
    drop(loader::load(On::Own, sizes, ConnectionLog::Off, Features::find()?, &program::ALL)?);
    remove(&pins, interfaces);
    Ok(())
}

/// Whether a file system at `path` is bpffs.
pub(crate) fn is_bpffs(path: &Path) -> bool {
    nix::sys::statfs::statfs(path).is_ok_and(|stat| stat.filesystem_type() == nix::sys::statfs::BPF_FS_MAGIC)
}
