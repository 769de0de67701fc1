//! What a bench measures, and how it is shown: beside a floor or a peer of the same run, with its spread.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use comfy_table::{CellAlignment, Table, presets::NOTHING};
use serde::Serialize;

/// Several measurements of one thing.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// These.
    pub fn new(samples: impl IntoIterator<Item = f64>) -> Self {
        let mut samples: Vec<f64> = samples.into_iter().collect();
        samples.sort_by(f64::total_cmp);
        Self(samples)
    }

    /// The least.
    pub fn min(&self) -> f64 {
        self.0.first().copied().unwrap_or(f64::NAN)
    }

    /// The one in the middle.
    pub fn median(&self) -> f64 {
        self.0.get(self.0.len() / 2).copied().unwrap_or(f64::NAN)
    }

    /// The greatest.
    pub fn max(&self) -> f64 {
        self.0.last().copied().unwrap_or(f64::NAN)
    }
}

/// What a figure ought to be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// At most so much.
    AtMost(f64),
    /// At least so much.
    AtLeast(f64),
}

impl Target {
    fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtMost(most) => value <= most,
            Self::AtLeast(least) => value >= least,
        }
    }

    fn show(self, value: f64) -> String {
        let (sign, bound) = match self {
            Self::AtMost(most) => ("≤", most),
            Self::AtLeast(least) => ("≥", least),
        };
        let bound = show(bound);
        if self.is_met(value) { format!("{sign} {bound}") } else { format!("{sign} {bound} missed") }
    }
}

/// A figure, ready to be shown.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// What was measured.
    pub name: String,
    /// In what: `ns`, `packets/s`, `ms`.
    pub unit: &'static str,
    /// The least of the measurements.
    pub min: f64,
    /// The one in the middle; what the target and the ratio are about.
    pub median: f64,
    /// The greatest.
    pub max: f64,
    /// What it is set beside: the name of another figure of this run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beside: Option<String>,
    /// The median in terms of that one's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
    /// What the median ought to be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
}

impl Figure {
    /// A figure from its measurements.
    pub fn new(name: impl Into<String>, unit: &'static str, samples: &Samples) -> Self {
        let (min, median, max) = (samples.min(), samples.median(), samples.max());
        Self { name: name.into(), unit, min, median, max, beside: None, ratio: None, target: None }
    }

    /// Sets it beside another one.
    #[must_use]
    pub fn beside(mut self, other: &Self) -> Self {
        self.beside = Some(other.name.clone());
        self.ratio = Some(self.median / other.median);
        self
    }

    /// Says what it ought to be.
    #[must_use]
    pub fn target(mut self, target: Target) -> Self {
        self.target = Some(target);
        self
    }
}

/// One table of figures.
#[derive(Clone, Debug, Serialize)]
pub struct Section {
    /// What they are about.
    pub title: String,
    /// What one must know to read them.
    pub notes: Vec<String>,
    /// Share of the machine, in percent, that something else used just before.
    pub noise_percent: f64,
    /// The figures.
    pub figures: Vec<Figure>,
}

/// What is shown of a run of the benches.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Kernel, processor, number of CPUs.
    pub machine: String,
    /// Tables in the order they were measured.
    pub sections: Vec<Section>,
    #[serde(skip)]
    json: bool,
    #[serde(skip)]
    patience: Duration,
}

/// More than this share of other work, in percent, makes figures unsure.
const QUIET_PERCENT: f64 = 10.0;
/// How long to wait for a quiet machine before each section.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How long the machine is watched at a time.
const WATCH: Duration = Duration::from_millis(500);

impl Report {
    /// An empty one; as a JSON document if asked, else as tables that are printed as they come. So long it waits for a
    /// quiet machine.
    pub fn new(json: bool, patience: Duration) -> Self {
        Self { machine: machine(), sections: vec![], json, patience }
    }

    /// Waits until the machine is idle, takes the measurements, shows them.
    pub fn section(&mut self, title: &str, notes: &[&str], measure: impl FnOnce() -> Vec<Figure>) {
        let noise_percent = quiet(self.patience);
        let figures = measure();
        let notes = notes.iter().map(|&note| note.to_owned()).collect();
        let section = Section { title: title.to_owned(), notes, noise_percent, figures };
        if !self.json {
            if self.sections.is_empty() {
                println!("{}", self.machine);
            }
            section.print();
        }
        self.sections.push(section);
    }

    /// Ends the run.
    pub fn finish(self) {
        if self.json {
            println!("{}", serde_json::to_string_pretty(&self).expect("plain data"));
            return;
        }
        let figures = self.sections.iter().flat_map(|section| &section.figures);
        let judged: Vec<_> = figures.filter_map(|figure| Some((figure, figure.target?))).collect();
        let missed: Vec<_> = judged.iter().filter(|(figure, target)| !target.is_met(figure.median)).collect();
        println!("\n{} of {} targets met", judged.len() - missed.len(), judged.len());
        for (figure, target) in missed {
            println!(
                "  {}: {} {}, {}",
                figure.name,
                show(figure.median),
                figure.unit,
                target.show(figure.median)
            );
        }
    }
}

impl Section {
    fn print(&self) {
        println!("\n{}", self.title);
        for note in &self.notes {
            println!("  {note}");
        }
        if self.noise_percent > QUIET_PERCENT {
            println!("  unsure: other work took {:.0} % of the machine", self.noise_percent);
        }
        let mut table = Table::new();
        table.load_preset(NOTHING);
        table.set_header(["", "", "MIN", "MEDIAN", "MAX", "RATIO", "TO", "TARGET"]);
        for index in 2..6 {
            if let Some(column) = table.column_mut(index) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        for figure in &self.figures {
            table.add_row([
                figure.name.clone(),
                figure.unit.to_owned(),
                show(figure.min),
                show(figure.median),
                show(figure.max),
                figure.ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}")),
                figure.beside.clone().unwrap_or_default(),
                figure.target.map_or_else(String::new, |target| target.show(figure.median)),
            ]);
        }
        println!("{table}");
    }
}

/// A number with as many digits as it deserves.
fn show(value: f64) -> String {
    match value.abs() {
        size if size >= 10_000.0 => format!("{:.0} k", value / 1_000.0),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Kernel, processor, number of CPUs.
fn machine() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1));
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let kernel = lb_userspace::datapath::release();
    format!("Linux {kernel}, {} x {}", cpus, model.unwrap_or("unknown processor"))
}

/// Waits until nothing else uses the machine, but not for ever; the share in percent that something still does.
fn quiet(patience: Duration) -> f64 {
    let start = Instant::now();
    loop {
        let (busy, all) = ticks();
        thread::sleep(WATCH);
        let (busy_then, all_then) = ticks();
        let percent = (busy_then - busy) as f64 * 100.0 / (all_then - all).max(1) as f64;
        if percent <= QUIET_PERCENT || start.elapsed() >= patience {
            return percent;
        }
    }
}

/// Ticks of all CPUs that were not idle, and all.
pub fn ticks() -> (u64, u64) {
    let times = processor_times();
    let all = times.iter().sum::<u64>();
    (all - times[IDLE] - times[WAITING], all)
}

/// Where [`processor_times`] has the time for work that gives way to all other.
pub const NICE: usize = 1;
/// Where the time at which a processor had nothing to do.
pub const IDLE: usize = 3;
/// Where the time at which it waited for a device.
pub const WAITING: usize = 4;
/// Where the time at which it was another guest's.
pub const STOLEN: usize = 7;

/// What all processors did since the machine was started, in hundredths of a second; proc_stat(5).
pub fn processor_times() -> [u64; 8] {
    let text = fs::read_to_string("/proc/stat").expect("read /proc/stat");
    let line = text.lines().next().unwrap_or_default();
    // What guests of this machine took, which comes after, is counted as user time already.
    let mut words = line.split_whitespace().skip(1);
    std::array::from_fn(|_| words.next().and_then(|word| word.parse().ok()).unwrap_or_default())
}
