//! `connections`: those that the datapath knows, and their end where somebody says so.

use std::{
    collections::{BTreeSet, HashSet},
    io::{self, BufRead as _, IsTerminal as _, Write as _},
    net::SocketAddr,
};

use anyhow::{Context as _, Result, bail};
use lb_common::abi::Removal;

use super::{inventories, list, out};
use crate::{
    cli::{ConnectionArgs, Output},
    cluster::Protocol,
    connection::{Connection, Filter, Names},
    controller::counted,
    datapath::{Seen, TableSet, Tools, Translations},
    inventory::Inventory,
    net::{Reset, Resetter},
    text,
};

/// The widths of columns are those of so many rows; longer ones that come later stand out.
const LOOKED_AT: usize = 1_000;
/// A connection that changes state between a look and its end is looked at again, so often.
const TRIES: usize = 5;
/// Connections that are ended at once: what one run of the program takes.
const BATCH: usize = Removal::BATCH;

/// Lists connections, counts or ends them.
///
/// # Errors
/// Nothing is attached, the kernel refuses, or nobody has said that they are to be ended.
pub async fn run(arguments: &ConnectionArgs) -> Result<()> {
    if arguments.kill {
        return kill(arguments);
    }
    let mut first = true;
    loop {
        if arguments.watch && arguments.read.output == Output::Table {
            out::redraw(first)?;
        }
        show(arguments)?;
        if !arguments.watch {
            return Ok(());
        }
        first = false;
        tokio::time::sleep(list::PERIOD).await;
    }
}

/// The datapath of an interface, with what is needed to look at its connections.
struct Datapath {
    inventory: Inventory,
    set: TableSet,
    tools: Tools,
}

impl Datapath {
    fn all(arguments: &ConnectionArgs) -> Result<Vec<Self>> {
        let tools = if arguments.kill { Tools::of } else { Tools::clock };
        let of = |(inventory, set)| Ok(Self { tools: tools(&set)?, inventory, set });
        inventories(&arguments.read)?.into_iter().map(of).collect()
    }

    /// Visits the connections that are asked for.
    fn each(
        &self,
        arguments: &ConnectionArgs,
        mut visit: impl FnMut(&Seen, &Connection<'_>, &dyn Fn() -> Vec<Reset>) -> Result<()>,
    ) -> Result<()> {
        let names = Names::of(&self.inventory, self.set.config()?, &self.set.aliases(self.tools.now()?)?);
        self.set.each_connection(&self.inventory.tables, &self.tools, |seen, resets| {
            let connection = names.connection(seen);
            let chosen = arguments.filter.iter().all(|filter| filter.chooses(&connection));
            if chosen { visit(seen, &connection, resets) } else { Ok(()) }
        })
    }

    fn count(&self, arguments: &ConnectionArgs) -> Result<u64> {
        let mut count = 0;
        self.each(arguments, |_, _, _| {
            count += 1;
            Ok(())
        })?;
        Ok(count)
    }
}

fn show(arguments: &ConnectionArgs) -> Result<()> {
    let datapaths = Datapath::all(arguments)?;
    if arguments.count {
        let counts = datapaths.iter().map(|datapath| datapath.count(arguments));
        let total: u64 = counts.sum::<Result<u64>>()?;
        return match arguments.read.output {
            Output::Table => out::line(total.to_string()),
            Output::Json => out::json(serde_json::json!({ "connections": total }), arguments.watch),
        };
    }
    let mut lines = out::Lines::new();
    for datapath in &datapaths {
        let table = arguments.format.is_none() && arguments.read.output == Output::Table;
        if table && datapaths.len() > 1 {
            lines.line(&format!("{}:", datapath.inventory.interface))?;
        }
        let mut rows = Rows::default();
        datapath.each(arguments, |_, connection, _| match (&arguments.format, arguments.read.output) {
            (Some(template), _) => lines.line(&list::fill(template, &serde_json::to_value(connection)?)?),
            (None, Output::Json) => lines.line(&text::clean_json(&serde_json::to_string(connection)?)),
            (None, Output::Table) => rows.add(connection, &mut lines),
        })?;
        if table {
            rows.end(&mut lines)?;
        }
    }
    lines.end()
}

/// Rows on their way out: the first ones wait until the widths of the columns are known.
#[derive(Default)]
struct Rows {
    waiting: Vec<[String; COLUMNS]>,
    widths: Option<[usize; COLUMNS]>,
}

const COLUMNS: usize = 8;
const HEADER: [&str; COLUMNS] =
    ["PROTOCOL", "STATE", "IDLE", "EXPIRES", "CLIENT", "LISTENER", "TASK", "NODE"];

impl Rows {
    fn add(&mut self, connection: &Connection<'_>, lines: &mut out::Lines) -> Result<()> {
        let row = cells(connection);
        match self.widths {
            Some(widths) => lines.line(&padded(&row, &widths)),
            None => {
                self.waiting.push(row);
                if self.waiting.len() < LOOKED_AT { Ok(()) } else { self.end(lines) }
            }
        }
    }

    /// Writes those that wait.
    fn end(&mut self, lines: &mut out::Lines) -> Result<()> {
        if self.widths.is_some() {
            return Ok(());
        }
        let header = HEADER.map(str::to_owned);
        let mut widths = [0; COLUMNS];
        for row in std::iter::once(&header).chain(&self.waiting) {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = cell.chars().count().max(*width);
            }
        }
        self.widths = Some(widths);
        let waiting = std::mem::take(&mut self.waiting);
        std::iter::once(&header).chain(&waiting).try_for_each(|row| lines.line(&padded(row, &widths)))
    }
}

fn cells(connection: &Connection<'_>) -> [String; COLUMNS] {
    let node = match (connection.node, connection.from) {
        (node, None) => node.unwrap_or_default().to_owned(),
        (node, Some(from)) => format!("{}, by {from}", node.unwrap_or_default()),
    };
    [
        connection.protocol.to_string(),
        connection.state.to_owned(),
        age(connection.idle_seconds),
        connection.expires_seconds.map(age).unwrap_or_default(),
        match connection.client_at_task {
            Some(address) => format!("{} as {address}", connection.client),
            None => connection.client.to_string(),
        },
        connection.listener.to_string(),
        connection.task.unwrap_or("(gone)").to_owned(),
        node,
    ]
    .map(|cell| text::clean(&cell).into_owned())
}

fn padded(row: &[String; COLUMNS], widths: &[usize; COLUMNS]) -> String {
    let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}   "));
    cells.collect::<String>().trim_end().to_owned()
}

/// A time in its two largest units, as people say it.
fn age(seconds: u32) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3_600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{minutes}m{}s", seconds % 60),
        3_600..86_400 => format!("{hours}h{}m", minutes % 60),
        _ => format!("{days}d{}h", hours % 24),
    }
}

/// Ends connections: their lines are taken away, and their ends next to this node are told by resets.
fn kill(arguments: &ConnectionArgs) -> Result<()> {
    let datapaths = Datapath::all(arguments)?;
    let wanted = datapaths.iter().map(|datapath| datapath.count(arguments)).sum::<Result<u64>>()?;
    if wanted == 0 {
        return out::line("no connection matches the filters");
    }
    if !arguments.force && !agreed(wanted)? {
        return out::line("none was ended");
    }
    let resetter = Resetter::open().context("open a raw socket (CAP_NET_RAW)")?;
    let mut done = Done::default();
    for datapath in &datapaths {
        // One that got into another state meanwhile is looked at again; a new one of the same client is another connection.
        let mut left: Option<HashSet<Ends>> = None;
        for _ in 0..TRIES {
            let aliases = datapath.set.aliases(datapath.tools.now()?)?;
            let known = Translations::new(datapath.set.config()?, &aliases, &datapath.inventory.tables);
            let mut end =
                Killing { datapath, arguments, resetter: &resetter, batch: Vec::new(), stay: HashSet::new() };
            datapath.each(arguments, |seen, connection, resets| {
                let is_due = left.as_ref().is_none_or(|left| left.contains(&ends(seen)));
                if !is_due {
                    return Ok(());
                }
                let mut resets = resets();
                known.readdress(&mut resets);
                end.add(seen, connection, resets, &mut done)
            })?;
            end.end(&mut done)?;
            if end.stay.is_empty() {
                break;
            }
            left = Some(end.stay);
        }
    }
    out::line(format!(
        "{} ended, {} told by resets",
        counted(done.ended, "connection"),
        counted(done.told, "end")
    ))?;
    if !done.others.is_empty() {
        let others: Vec<String> = done.others.into_iter().collect();
        out::line(format!(
            "the other ends are known by other nodes: do the same on {}",
            text::clean(&others.join(", "))
        ))?;
    }
    Ok(())
}

/// Protocol, client and listener of a connection.
type Ends = (Protocol, SocketAddr, SocketAddr);

fn ends(seen: &Seen) -> Ends {
    (seen.protocol, seen.client, seen.listener)
}

/// What was ended.
#[derive(Default)]
struct Done {
    ended: usize,
    told: usize,
    /// Nodes that know the other ends.
    others: BTreeSet<String>,
}

/// Ends connections, some at once: what is known of their sequence numbers is hardly older.
struct Killing<'a> {
    datapath: &'a Datapath,
    arguments: &'a ConnectionArgs,
    resetter: &'a Resetter,
    /// Those that are next; and where another node knows the other end, which.
    batch: Vec<(Seen, Vec<Reset>, Option<String>)>,
    /// Those that have changed meanwhile.
    stay: HashSet<Ends>,
}

impl Killing<'_> {
    fn add(
        &mut self,
        seen: &Seen,
        connection: &Connection<'_>,
        resets: Vec<Reset>,
        done: &mut Done,
    ) -> Result<()> {
        let there = connection.node.filter(|_| connection.via == Some("peer"));
        let by = connection.from.filter(|_| !connection.direct);
        self.batch.push((*seen, resets, there.or(by).map(str::to_owned)));
        if self.batch.len() < BATCH { Ok(()) } else { self.end(done) }
    }

    fn end(&mut self, done: &mut Done) -> Result<()> {
        let Datapath { set, tools, .. } = self.datapath;
        let idle = self.arguments.filter.iter().any(Filter::is_idle);
        let removed = set.end_connections(tools, self.batch.iter().map(|(seen, ..)| seen), idle)?;
        for ((seen, resets, there), removed) in self.batch.drain(..).zip(removed) {
            if !removed {
                self.stay.insert(ends(&seen));
                continue;
            }
            done.ended += 1;
            let sent = self.resetter.send(&resets);
            done.told += sent.sent;
            if let Some(error) = sent.error {
                log::warn!("send a reset: {error}");
            }
            done.others.extend(there);
        }
        Ok(())
    }
}

/// Asks the person at the terminal.
fn agreed(wanted: u64) -> Result<bool> {
    let wanted = counted(wanted as usize, "connection");
    if !io::stdin().is_terminal() {
        bail!("{wanted} would be ended; add --force to end them where nobody can be asked");
    }
    eprint!("End {wanted}? [y/N] ");
    io::stderr().flush().context("write to standard error")?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer).context("read the answer")?;
    Ok(matches!(answer.trim().to_lowercase().as_str(), "y" | "yes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_said_in_two_units() {
        for (seconds, said) in
            [(0, "0s"), (59, "59s"), (61, "1m1s"), (3_600, "1h0m"), (7_440, "2h4m"), (90_000, "1d1h")]
        {
            assert_eq!(age(seconds), said);
        }
    }

    #[test]
    fn columns_are_as_wide_as_what_is_in_them() {
        let row = |client: &str| {
            let mut row = HEADER.map(str::to_owned);
            row[4] = client.to_owned();
            row
        };
        let mut widths = HEADER.map(str::len);
        widths[4] = 20;
        let [short, long] =
            ["198.51.100.7:1", "198.51.100.77:40000"].map(|client| padded(&row(client), &widths));
        assert_eq!(short.find("LISTENER"), long.find("LISTENER"));
        assert!(!short.ends_with(' '));
    }
}
