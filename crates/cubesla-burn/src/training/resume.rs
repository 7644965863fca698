//! The state of a training run on disk.

use std::fs;
use std::path::{Path, PathBuf};

use burn_core::module::Module;
use burn_optim::ModuleOptimizer;

use crate::Error;

/// A folder that holds the last state of one run: the model's record, the optimiser's, and the losses.
#[derive(Clone, Debug)]
pub struct Resume {
    /// The folder; made if it is not there.
    pub folder: PathBuf,
    /// Steps from one writing to the next; the last step is always written.
    pub every: usize,
}

/// The file whose presence makes the others count: a loss a line.
const LOSSES: &str = "losses.txt";

impl Resume {
    /// What the folder holds, or what came in if it holds nothing.
    pub(super) fn read<M: Module>(
        &self,
        model: M,
        optimizer: ModuleOptimizer,
    ) -> Result<(M, ModuleOptimizer, Vec<f32>), Error> {
        let path = self.folder.join(LOSSES);
        if !path.exists() {
            return Ok((model, optimizer, Vec::new()));
        }
        let text = fs::read_to_string(&path).map_err(|reason| error(&path, reason))?;
        let losses: Result<Vec<f32>, _> = text.lines().map(str::parse).collect();
        let losses = losses.map_err(|reason| error(&path, reason))?;
        let [model_file, optimizer_file] = self.files(losses.len());
        let model = model
            .try_load_file(&model_file)
            .map_err(|reason| error(&model_file, reason))?;
        let optimizer = optimizer
            .load(&optimizer_file)
            .map_err(|reason| error(&optimizer_file, reason))?;
        Ok((model, optimizer, losses))
    }

    /// Writes the state after `losses.len()` of `steps` steps, if it is time.
    pub(super) fn write<M: Module>(
        &self,
        model: &M,
        optimizer: &ModuleOptimizer,
        losses: &[f32],
        steps: usize,
    ) -> Result<(), Error> {
        let step = losses.len();
        if !step.is_multiple_of(self.every.max(1)) && step != steps {
            return Ok(());
        }
        fs::create_dir_all(&self.folder).map_err(|reason| error(&self.folder, reason))?;
        let [model_file, optimizer_file] = self.files(step);
        model
            .clone()
            .save_file(&model_file)
            .map_err(|reason| error(&model_file, reason))?;
        optimizer
            .save(&optimizer_file)
            .map_err(|reason| error(&optimizer_file, reason))?;
        // The losses say which state counts; renaming them replaces the old ones at once.
        let path = self.folder.join(LOSSES);
        let new = path.with_extension("new");
        let lines: Vec<String> = losses.iter().map(f32::to_string).collect();
        fs::write(&new, lines.join("\n")).map_err(|reason| error(&new, reason))?;
        fs::rename(&new, &path).map_err(|reason| error(&path, reason))?;
        self.remove_others(step)
    }

    /// Removes the states of other steps than `step`.
    fn remove_others(&self, step: usize) -> Result<(), Error> {
        let kept = self.files(step);
        let entries = fs::read_dir(&self.folder).map_err(|reason| error(&self.folder, reason))?;
        for entry in entries {
            let path = entry.map_err(|reason| error(&self.folder, reason))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let is_state = name.starts_with("model-") || name.starts_with("optimizer-");
            if is_state && !kept.contains(&path) {
                fs::remove_file(&path).map_err(|reason| error(&path, reason))?;
            }
        }
        Ok(())
    }

    fn files(&self, step: usize) -> [PathBuf; 2] {
        ["model", "optimizer"].map(|what| self.folder.join(format!("{what}-{step}.bpk")))
    }
}

fn error(path: &Path, reason: impl ToString) -> Error {
    Error::Resume {
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}
