//! Where a run's published weights and its teachers' heads lie: in the run folder, or in the broker's store for machines
//! that share no folder (`host.weights_transport`).

use std::path::PathBuf;
use std::sync::Arc;

use cosmos_broker::Store;
use cosmos_config::WeightsTransport;
use cosmos_engine::head::Head;

use crate::error::Result;
use crate::heads::TeacherHead;
use crate::prepare::Base;
use crate::roles::RoleOptions;
use crate::roles::seat::{RunInfo, Seat};
use crate::shelf::{FolderShelf, Shelf, StoreShelf};
use crate::teachers::{self, TeacherSpec};

/// Folder of published weights.
pub const WEIGHTS: &str = "weights";
/// Folder of what teachers leave.
pub const TEACHERS: &str = "teachers";
/// How long what lies in the store is kept. A version that is still wanted then is published again.
const KEEP_MS_MAX: u64 = 7 * 24 * 3600 * 1000;
/// Says that a teacher's head was put there: the head itself is too large to be read for that.
const HEAD_MARK: &str = "head.put";

/// The shelves of a run.
#[derive(Clone)]
pub enum Shelves {
    /// In the run folder.
    Folder(PathBuf),
    /// In the broker.
    Store(Arc<dyn Store>),
}

impl Shelves {
    /// Those that the config asks for.
    ///
    /// # Errors
    /// A run folder that this process does not see, where it is needed.
    pub fn open(base: &Base, options: &RoleOptions, seat: &Seat, store: &Arc<dyn Store>) -> Result<Self> {
        match base.config().host.weights_transport {
            WeightsTransport::Store => Ok(Self::Store(Arc::clone(store))),
            WeightsTransport::Auto | WeightsTransport::Folder | WeightsTransport::Nccl => {
                seat.run_folder(options).map(Self::Folder)
            }
        }
    }

    /// Those of a process whose replica another process speaks for. It has no connection to the broker but for this.
    ///
    /// # Errors
    /// As [`Shelves::open`], and a broker that cannot be reached.
    pub fn follow(base: &Base, options: &RoleOptions, info: &RunInfo, name: &str) -> Result<Self> {
        match base.config().host.weights_transport {
            WeightsTransport::Store => Ok(Self::Store(info.store(info.broker(base)?))),
            WeightsTransport::Auto | WeightsTransport::Folder | WeightsTransport::Nccl => {
                info.folder(options, name).map(Self::Folder)
            }
        }
    }

    fn shelf(&self, names: &[&str]) -> Result<Arc<dyn Shelf>> {
        match self {
            Self::Folder(root) => {
                let path = names.iter().fold(root.clone(), |path, name| path.join(name));
                Ok(Arc::new(FolderShelf::open(&path)?))
            }
            Self::Store(store) => Ok(Arc::new(StoreShelf::new(Arc::clone(store), &names.join("/"), KEEP_MS_MAX))),
        }
    }

    /// That of published weights.
    ///
    /// # Errors
    /// A folder that cannot be made.
    pub fn weights(&self) -> Result<Arc<dyn Shelf>> {
        self.shelf(&[WEIGHTS])
    }

    /// That of what concerns all teachers.
    ///
    /// # Errors
    /// A folder that cannot be made.
    pub fn teachers(&self) -> Result<Arc<dyn Shelf>> {
        self.shelf(&[TEACHERS])
    }

    fn head(&self, teacher: &str) -> Result<Arc<dyn Shelf>> {
        self.shelf(&[TEACHERS, teacher])
    }

    /// Leaves a teacher's head. `again`: only where it has been lost, as by a broker that was restarted empty.
    ///
    /// # Errors
    /// Those of the shelf.
    pub fn put_head(&self, head: impl FnOnce() -> Result<TeacherHead>, teacher: &str, again: bool) -> Result<()> {
        let shelf = self.head(teacher)?;
        if again && (matches!(self, Self::Folder(_)) || shelf.get(HEAD_MARK, 64)?.is_some()) {
            return Ok(());
        }
        if again {
            tracing::warn!("{}: the head of teacher `{teacher}` is gone and is left again", shelf.place());
        }
        head()?.write(shelf.as_ref())?;
        shelf.put(HEAD_MARK, b"1")
    }

    /// The heads of the run's teachers, in their order. Waits until they are there.
    ///
    /// # Errors
    /// The deadline, with the teacher's name.
    pub fn heads(&self, base: &Base) -> Result<Vec<Box<dyn Head>>> {
        let host = &base.config().host;
        let of = |spec: &TeacherSpec| {
            let shelf = self.head(&spec.name)?;
            TeacherHead::read(shelf.as_ref(), &spec.name, &spec.config, host.weights_wait_ms_max)?.load(&host.device)
        };
        teachers::specs(base)?.iter().map(of).collect()
    }
}
