//! The commands.

mod api;
mod backends;
pub(crate) mod completion;
mod console;
mod create;
mod edit;
mod event;
mod events;
mod get;
mod health;
mod lifecycle;
mod list;
mod live;
pub(crate) mod man;
mod run;
mod session;
mod signals;
mod update;
mod wait;
mod watch;
mod watcher;

use crate::cli::Command;
use crate::failure::Failure;

pub(crate) use session::Session;

/// Carries out a command.
///
/// # Errors
///
/// The command's own; see [`Failure`].
pub(crate) async fn run(mut session: Session, command: Command) -> Result<(), Failure> {
    let session = &mut session;
    match command {
        Command::Create(arguments) => create::create(session, &arguments).await,
        Command::Run(arguments) => run::run(session, &arguments).await,
        Command::Console(arguments) => console::run(session, &arguments).await,
        Command::Validate(arguments) => create::validate(session, &arguments).await,
        Command::Update(arguments) => update::run(session, &arguments).await,
        Command::Edit(arguments) => edit::run(session, &arguments).await,
        Command::Boot(names) => lifecycle::boot(session, &names).await,
        Command::Shutdown(arguments) => lifecycle::shutdown(session, &arguments).await,
        Command::Pause(names) => lifecycle::pause(session, &names).await,
        Command::Resume(names) => lifecycle::resume(session, &names).await,
        Command::Reboot(arguments) => lifecycle::reboot(session, &arguments).await,
        Command::Delete(arguments) => lifecycle::delete(session, &arguments).await,
        Command::List(arguments) => list::run(session, &arguments).await,
        Command::Get(arguments) => get::run(session, &arguments).await,
        Command::Wait(arguments) => wait::run(session, &arguments).await,
        Command::Watch(arguments) => watch::run(session, &arguments).await,
        Command::Events(arguments) => events::run(session, &arguments).await,
        Command::Backends(arguments) => backends::run(session, &arguments).await,
        Command::Health => health::run(session).await,
        Command::Api(arguments) => api::run(session, &arguments).await,
        Command::Completion { shell } => completion::registration(shell),
        Command::Man(arguments) => man::run(&arguments),
    }
}
