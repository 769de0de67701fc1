//! `events`: what happened, as `docker events` shows it.

use std::{
    fs,
    io::{ErrorKind, Read as _, Seek as _, SeekFrom},
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use anyhow::{Context as _, Result};
use notify::{RecursiveMode, Watcher as _};
use tokio::sync::mpsc;

use super::{list, out};
use crate::{
    cli::{EventArgs, Output},
    events::{self, Event},
    text,
};

/// Prints the last events, and those that come if asked to.
///
/// # Errors
/// They cannot be read, or written.
pub async fn run(arguments: &EventArgs) -> Result<()> {
    let path = events::path().context("ask the kernel for the network namespace")?;
    // Watched before it is read: what comes between the two is seen twice, never missed.
    let mut changes = if arguments.follow { Some(Changes::of(&path)?) } else { None };
    let mut reader = Reader::default();
    let mut events = match reader.read(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            anyhow::bail!("read {}: {error}; this needs root: run it with sudo", path.display())
        }
        read => read.with_context(|| format!("read {}", path.display()))?,
    };
    let chosen = |event: &Event| list::chooses(&serde_json::to_value(event)?, &arguments.filter);
    let since = arguments
        .since
        .map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX))
        .map_or(0, |age| Event::now("", events::Kind::Problem, "").time.saturating_sub(age));
    let mut kept = Vec::new();
    for event in events.drain(..).filter(|event| event.time >= since) {
        if chosen(&event)? {
            kept.push(event);
        }
    }
    let skipped = kept.len().saturating_sub(arguments.last.unwrap_or(events::KEPT));
    kept.iter().skip(skipped).try_for_each(|event| show(event, arguments.output))?;
    while let Some(changes) = &mut changes {
        changes.next().await?;
        for event in reader.read(&path).unwrap_or_default() {
            if chosen(&event)? {
                show(&event, arguments.output)?;
            }
        }
    }
    Ok(())
}

fn show(event: &Event, output: Output) -> Result<()> {
    if output == Output::Json {
        return out::line(text::clean_json(&serde_json::to_string(event)?));
    }
    out::line(format!("{} {} {} {}", event.moment(), event.interface, event.kind.name(), event.text))
}

/// Reads what was added to a file that is written anew from time to time.
#[derive(Default)]
struct Reader {
    inode: u64,
    position: u64,
    /// Of the last event that was read.
    last: u64,
}

impl Reader {
    fn read(&mut self, path: &Path) -> std::io::Result<Vec<Event>> {
        let mut file = fs::File::open(path)?;
        let meta = file.metadata()?;
        let same = meta.ino() == self.inode && meta.len() >= self.position;
        let position = if same { self.position } else { 0 };
        file.seek(SeekFrom::Start(position))?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        // The end of a line that is being written is left for the next time.
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        (self.inode, self.position) = (meta.ino(), position + whole as u64);
        let events = text[..whole].lines().filter_map(|line| serde_json::from_str::<Event>(line).ok());
        // One that was written anew begins with what was read before.
        let last = if same { 0 } else { self.last };
        let events: Vec<Event> = events.filter(|event| event.time > last).collect();
        self.last = events.last().map_or(self.last, |event| event.time);
        Ok(events)
    }
}

/// Tells when a file may have changed.
struct Changes {
    _watcher: notify::RecommendedWatcher,
    woken: mpsc::Receiver<()>,
}

impl Changes {
    fn of(path: &Path) -> Result<Self> {
        let (wake, woken) = mpsc::channel(1);
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // That it is read is no change of it.
            if !event.is_ok_and(|event| matches!(event.kind, notify::EventKind::Access(_))) {
                // A full channel means that a reading is due already.
                let _ = wake.try_send(());
            }
        })
        .context("watch files")?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        // An agent may come later.
        events::make_folder(folder)?;
        watcher
            .watch(folder, RecursiveMode::NonRecursive)
            .with_context(|| format!("watch {}", folder.display()))?;
        Ok(Self { _watcher: watcher, woken })
    }

    async fn next(&mut self) -> Result<()> {
        self.woken.recv().await.context("the watcher ended")
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn what_is_added_is_read_once_also_after_the_file_was_written_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        let line = |time: u64| {
            let event = Event { time, ..Event::now("eth1", events::Kind::TaskAdded, "x") };
            serde_json::to_string(&event).unwrap() + "\n"
        };
        let mut reader = Reader::default();
        let mut times = || reader.read(&path).unwrap().iter().map(|event| event.time).collect::<Vec<_>>();
        fs::write(&path, line(1) + &line(2)).unwrap();
        assert_eq!(times(), [1, 2]);
        let half = line(3);
        let mut file = fs::OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(&half.as_bytes()[..9]).unwrap();
        assert_eq!(times(), [0; 0]);
        file.write_all(&half.as_bytes()[9..]).unwrap();
        assert_eq!(times(), [3]);
        fs::write(folder.path().join("new"), line(2) + &line(3) + &line(4)).unwrap();
        fs::rename(folder.path().join("new"), &path).unwrap();
        assert_eq!(times(), [4]);
    }
}
