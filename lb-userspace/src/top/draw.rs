//! Drawing `top`, in 80 columns and 24 rows or more.

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Modifier, Style, Stylize as _},
    text::{Line, Span},
    widgets::{Block, Borders, Cell, Clear, Paragraph, Row, Table, TableState, Wrap},
};

use super::model::{Model, Pane};
use crate::inventory::Agent;

/// Draws everything.
pub fn draw(frame: &mut Frame<'_>, model: &Model) {
    let [head, problem, body, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(u16::from(warning(model).is_some())),
        Constraint::Min(5),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    let title = format!("lb top  {}  {}", model.seen.interface, model.seen.title);
    frame.render_widget(Line::from(title).bold(), head);
    if let Some(text) = warning(model) {
        frame.render_widget(Line::from(format!("! {text}")).yellow().bold(), problem);
    }
    match model.pane {
        Pane::Services => {
            let lower = (body.height / 3).max(5);
            let [upper, lower] =
                Layout::vertical([Constraint::Min(4), Constraint::Length(lower)]).areas(body);
            services(frame, model, upper);
            let [left, right] =
                Layout::horizontal([Constraint::Percentage(55), Constraint::Percentage(45)]).areas(lower);
            nodes(frame, model, left, false);
            outcomes(frame, model, right, false);
        }
        Pane::Tasks => tasks(frame, model, body),
        Pane::Nodes => nodes(frame, model, body, true),
        Pane::Outcomes => outcomes(frame, model, body, true),
    }
    frame.render_widget(footer(model), foot);
    if model.help {
        help(frame);
    }
}

fn warning(model: &Model) -> Option<&str> {
    model.problem.as_deref().or_else(|| model.seen.problems.first().map(String::as_str))
}

fn footer(model: &Model) -> Line<'static> {
    if let Some(typing) = &model.typing {
        return Line::from(format!("filter: {typing}_   Enter takes it, Esc leaves it"));
    }
    let filter = if model.filter.is_empty() { String::new() } else { format!("  filter {:?}", model.filter) };
    let order = if model.reversed { " reversed" } else { "" };
    Line::from(format!(
        "q quit  ? keys  Tab pane  Enter tasks  / filter  s sort: {}{order}{filter}",
        model.sort.name()
    ))
    .dim()
}

fn help(frame: &mut Frame<'_>) {
    const KEYS: &str = "\
Tab, 1-4     services, tasks, nodes, what became of packets
Up, Down     another row (also j, k, PgUp, PgDn)
Enter        the tasks of a service; Esc goes back
/            show only names with this in them
s, r         sort by another column; the other way round
q, Ctrl-C    quit

NEW/s        new connections a second
OPEN         connections that are open
FAIL/s       connections that a task did not take, a second
IN, OUT      bytes a second from and to clients";
    let area = frame.area();
    let (width, height) = (66.min(area.width), 14.min(area.height));
    let area = Rect::new((area.width - width) / 2, (area.height - height) / 2, width, height);
    frame.render_widget(Clear, area);
    let text = Paragraph::new(KEYS)
        .block(Block::new().borders(Borders::ALL).title(" keys "))
        .wrap(Wrap { trim: false });
    frame.render_widget(text, area);
}

fn table<const N: usize>(
    frame: &mut Frame<'_>,
    area: Rect,
    (header, widths): ([&'static str; N], [Constraint; N]),
    rows: Vec<Row<'static>>,
    selected: Option<usize>,
) {
    let table = Table::new(rows, widths)
        .header(Row::new(header).style(Style::new().add_modifier(Modifier::BOLD | Modifier::UNDERLINED)))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED))
        .column_spacing(1);
    let mut state = TableState::new().with_selected(selected);
    frame.render_stateful_widget(table, area, &mut state);
}

fn services(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let rows = model.services().into_iter().map(|service| {
        let rates = model.of_service(&service.name);
        let its = model.seen.tasks.iter().filter(|task| task.service == service.name);
        let open: u64 = its.filter_map(|task| task.open_connections).sum();
        let tasks = format!("{}/{}", service.active_tasks, service.tasks);
        // Not by colour alone: what is wrong has a mark.
        let mark = if service.problem.is_some() { "!" } else { " " };
        let style = if service.problem.is_some() { Style::new().yellow() } else { Style::new() };
        let failovers = rate(rates.failovers);
        Row::new([
            Cell::from(format!("{mark}{}", service.name)),
            right(tasks, 7),
            right(rate(rates.new), 7),
            right(short(open as f64), 6),
            right(if rates.failovers > 0.0 { format!("{failovers}!") } else { failovers }, 7),
            right(bytes(rates.request), 7),
            right(bytes(rates.reply), 7),
            Cell::from(sparkline(&model.history(&service.name), 12)),
        ])
        .style(style)
    });
    let widths = [
        Constraint::Min(14),
        Constraint::Length(7),
        Constraint::Length(7),
        Constraint::Length(6),
        Constraint::Length(7),
        Constraint::Length(7),
        Constraint::Length(7),
        Constraint::Length(12),
    ];
    let header = ["SERVICE", "  TASKS", "  NEW/s", "  OPEN", " FAIL/s", "   IN/s", "  OUT/s", "NEW/s"];
    table(frame, area, (header, widths), rows.collect(), Some(model.selected));
}

fn tasks(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let rows = model.tasks().into_iter().map(|task| {
        let rates = model.of_task(&task.name);
        let style = match (&task.problem, task.active) {
            (Some(_), _) => Style::new().yellow(),
            (None, false) => Style::new().dim(),
            (None, true) => Style::new(),
        };
        let mark = if task.problem.is_some() { "!" } else { " " };
        let problem = task.problem.clone().unwrap_or_else(|| task.addresses.join(" "));
        Row::new([
            Cell::from(format!("{mark}{}", task.name)),
            Cell::from(task.node.clone()),
            Cell::from(task.state.clone()),
            right(rate(rates.new), 6),
            right(short(task.open_connections.unwrap_or_default() as f64), 5),
            right(rate(rates.failovers), 6),
            right(bytes(rates.reply), 6),
            Cell::from(problem),
        ])
        .style(style)
    });
    let widths = [
        Constraint::Length(16),
        Constraint::Length(10),
        Constraint::Length(9),
        Constraint::Length(6),
        Constraint::Length(5),
        Constraint::Length(6),
        Constraint::Length(6),
        Constraint::Min(12),
    ];
    let header = ["TASK", "NODE", "STATE", " NEW/s", " OPEN", "FAIL/s", " OUT/s", "PROBLEM OR ADDRESS"];
    table(frame, area, (header, widths), rows.collect(), Some(model.selected));
}

fn nodes(frame: &mut Frame<'_>, model: &Model, area: Rect, whole: bool) {
    let rows = model.nodes().into_iter().map(|node| {
        let (word, style) = match node.agent {
            Agent::Yes if node.this => ("this", Style::new()),
            Agent::Yes => ("answers", Style::new()),
            Agent::Silent => ("SILENT", Style::new().red().bold()),
            Agent::None => ("no agent", Style::new().dim()),
        };
        Row::new([
            Cell::from(format!("{}{}", node.name, if node.this { " *" } else { "" })),
            Cell::from(word),
            right(node.tasks.to_string(), 5),
            Cell::from(node.problem.clone().unwrap_or_default()),
        ])
        .style(style)
    });
    let widths = [Constraint::Length(14), Constraint::Length(8), Constraint::Length(5), Constraint::Min(8)];
    let header = ["NODE", "PROBE", "TASKS", "PROBLEM"];
    table(frame, area, (header, widths), rows.collect(), whole.then_some(model.selected));
}

fn outcomes(frame: &mut Frame<'_>, model: &Model, area: Rect, whole: bool) {
    let rows = model.outcomes().into_iter().map(|(name, packets, dropped)| {
        let style = if *dropped { Style::new().yellow() } else { Style::new() };
        let mark = if *dropped { "!" } else { " " };
        Row::new([
            Cell::from(format!("{mark}{name}")),
            right(rate(model.of_outcome(name)), 8),
            right(short(*packets as f64), 7),
        ])
        .style(style)
    });
    let widths = [Constraint::Min(16), Constraint::Length(8), Constraint::Length(7)];
    let header = ["OUTCOME (! dropped)", "  PACK/s", "    ALL"];
    table(frame, area, (header, widths), rows.collect(), whole.then_some(model.selected));
}

fn right(text: String, width: usize) -> Cell<'static> {
    Cell::from(Span::raw(format!("{text:>width$}")))
}

/// A number in at most five letters.
pub fn short(number: f64) -> String {
    match number {
        n if n < 1e4 => format!("{n:.0}"),
        n if n < 1e6 => format!("{:.1}k", n / 1e3),
        n if n < 1e9 => format!("{:.1}M", n / 1e6),
        n => format!("{:.1}G", n / 1e9),
    }
}

fn rate(number: f64) -> String {
    if number > 0.0 && number < 10.0 { format!("{number:.1}") } else { short(number) }
}

fn bytes(number: f64) -> String {
    match number {
        n if n < 1024.0 => format!("{n:.0}B"),
        n if n < 1024.0 * 1024.0 => format!("{:.1}K", n / 1024.0),
        n if n < 1024.0 * 1024.0 * 1024.0 => format!("{:.1}M", n / 1024.0 / 1024.0),
        n => format!("{:.1}G", n / 1024.0 / 1024.0 / 1024.0),
    }
}

/// The last values as bars.
pub fn sparkline(values: &[u64], width: usize) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let shown = &values[values.len().saturating_sub(width)..];
    let most = shown.iter().copied().max().unwrap_or_default().max(1);
    shown.iter().map(|value| BARS[(value * 7 / most) as usize]).collect()
}
