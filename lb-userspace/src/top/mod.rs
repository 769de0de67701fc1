//! `top`: services, tasks, nodes and outcomes on a terminal, with rates, redrawn every second. It reads the pinned tables
//! and needs no controller.

mod draw;
mod model;
#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
pub use draw::draw;
pub use model::{Model, Pane, Seen, Sort};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

/// Between two looks.
const PERIOD: Duration = Duration::from_secs(1);

/// Shows it until the user has seen enough.
///
/// # Errors
/// It cannot be read, or the terminal cannot be drawn on.
pub fn run(read: impl Fn() -> Result<Seen>) -> Result<()> {
    let mut model = Model::new(read()?);
    // Puts the terminal back also where this panics.
    let mut terminal = ratatui::try_init().context("draw on the terminal; `top` needs one")?;
    let ended = watch(&mut terminal, &mut model, read);
    ratatui::restore();
    ended
}

fn watch(
    terminal: &mut ratatui::DefaultTerminal,
    model: &mut Model,
    read: impl Fn() -> Result<Seen>,
) -> Result<()> {
    let mut due = Instant::now() + PERIOD;
    loop {
        terminal.draw(|frame| draw(frame, model)).context("draw on the terminal")?;
        let left = due.saturating_duration_since(Instant::now());
        if event::poll(left).context("read the keyboard")? {
            if let Event::Key(key) = event::read().context("read the keyboard")?
                && key.kind == KeyEventKind::Press
                && !press(model, key)
            {
                return Ok(());
            }
            continue;
        }
        due = Instant::now() + PERIOD;
        match read() {
            Ok(seen) => model.take(seen),
            // It may be attached again in a moment.
            Err(error) => model.problem = Some(format!("{error:#}")),
        }
    }
}

/// Does what a key asks for; false at the end.
pub fn press(model: &mut Model, key: KeyEvent) -> bool {
    if key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL) {
        return false;
    }
    if let Some(filter) = &mut model.typing {
        match key.code {
            KeyCode::Enter => model.filter = model.typing.take().unwrap_or_default(),
            KeyCode::Esc => model.typing = None,
            KeyCode::Backspace => drop(filter.pop()),
            KeyCode::Char(letter) => filter.push(letter),
            _ => {}
        }
        return true;
    }
    match key.code {
        KeyCode::Char('q') => return false,
        KeyCode::Char('?' | 'h') => model.help = !model.help,
        KeyCode::Char('/') => model.typing = Some(model.filter.clone()),
        KeyCode::Char('s') => model.sort = model.sort.next(),
        KeyCode::Char('r') => model.reversed = !model.reversed,
        KeyCode::Tab => model.show(model.pane.next()),
        KeyCode::Char('1') => model.show(Pane::Services),
        KeyCode::Char('2') => model.show(Pane::Tasks),
        KeyCode::Char('3') => model.show(Pane::Nodes),
        KeyCode::Char('4' | 'd') => model.show(Pane::Outcomes),
        KeyCode::Down | KeyCode::Char('j') => model.go(1),
        KeyCode::Up | KeyCode::Char('k') => model.go(-1),
        KeyCode::PageDown => model.go(10),
        KeyCode::PageUp => model.go(-10),
        KeyCode::Enter => model.enter(),
        KeyCode::Esc => {
            if model.help {
                model.help = false;
            } else if !model.filter.is_empty() {
                model.filter.clear();
            } else {
                model.leave();
            }
        }
        _ => {}
    }
    true
}
