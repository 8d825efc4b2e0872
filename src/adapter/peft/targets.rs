//! Which maps of a model PEFT's configuration adapts.

use serde_json::Value;

use crate::adapter::modules::ModuleId;

/// `target_modules` and what narrows it.
#[derive(Debug, PartialEq)]
pub(super) struct Targets {
    maps: Maps,
    /// `layers_to_transform`.
    layers: Option<Vec<usize>>,
}

#[derive(Debug, PartialEq)]
enum Maps {
    /// Ends of paths, at whole names.
    Named(Vec<String>),
    All,
    /// An expression, or exclusions: those that the file has tensors of.
    InFile,
}

impl Targets {
    /// From the values of the configuration's keys.
    pub fn parse(target_modules: &Value, excluded: &Value, layers: &Value) -> Result<Self, String> {
        let mut maps = match target_modules {
            Value::String(text) if text == "all-linear" => Maps::All,
            Value::String(_) => Maps::InFile,
            Value::Array(names) => {
                let names = names.iter().map(|name| name.as_str().map(str::to_owned));
                let names: Option<Vec<_>> = names.collect();
                Maps::Named(names.ok_or("target_modules holds something that is no name")?)
            }
            _ => return Err("target_modules is missing".into()),
        };
        if !super::config::is_off(excluded) {
            maps = Maps::InFile;
        }
        let index = |value: &Value| {
            let n = value.as_u64().and_then(|n| usize::try_from(n).ok());
            n.ok_or(format!(
                "layers_to_transform holds {value}, no layer's number"
            ))
        };
        let layers = match layers {
            Value::Null => None,
            Value::Array(list) => Some(list.iter().map(index).collect::<Result<_, _>>()?),
            one => Some(vec![index(one)?]),
        };
        Ok(Self { maps, layers })
    }

    /// The adapted modules in model order; `in_file` says which ones the file knows.
    pub fn modules(
        &self,
        num_layers: usize,
        in_file: &dyn Fn(ModuleId) -> bool,
    ) -> Result<Vec<ModuleId>, String> {
        if let Some(n) = self.layers.iter().flatten().find(|&&n| n >= num_layers) {
            return Err(format!(
                "layers_to_transform names layer {n}, the model has {num_layers}"
            ));
        }
        if let Maps::Named(names) = &self.maps {
            let unknown = names
                .iter()
                .find(|name| !ModuleId::all(num_layers).any(|id| ends_with(id, name)));
            if let Some(name) = unknown {
                return Err(format!(
                    "target_modules names {name:?}; q_proj, k_proj, v_proj, o_proj, gate_proj, \
                     up_proj and down_proj of the model's blocks can be adapted"
                ));
            }
        }
        let wanted = |id: &ModuleId| match &self.maps {
            Maps::Named(names) => names.iter().any(|name| ends_with(*id, name)),
            Maps::All => true,
            Maps::InFile => in_file(*id),
        };
        let in_layers =
            |id: &ModuleId| (self.layers.as_ref()).is_none_or(|list| list.contains(&id.layer));
        let modules: Vec<_> = ModuleId::all(num_layers)
            .filter(wanted)
            .filter(in_layers)
            .collect();
        match modules.is_empty() {
            true => Err("no map of the model is adapted".into()),
            false => Ok(modules),
        }
    }
}

/// Whether the module's path is `name` or ends with it, at a dot.
fn ends_with(id: ModuleId, name: &str) -> bool {
    let path = id.to_string();
    path.strip_suffix(name)
        .is_some_and(|rest| !name.is_empty() && (rest.is_empty() || rest.ends_with('.')))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn paths(targets: Value, excluded: Value, layers: Value) -> Result<Vec<String>, String> {
        let targets = Targets::parse(&targets, &excluded, &layers)?;
        let in_file = |id: ModuleId| id.to_string().ends_with("1.mlp.up_proj");
        let modules = targets.modules(3, &in_file)?;
        Ok(modules.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn names_are_ends_of_paths() {
        let found = |targets| paths(targets, json!(null), json!(null)).unwrap();
        assert_eq!(found(json!(["v_proj", "q_proj"])).len(), 6);
        assert_eq!(found(json!(["self_attn.q_proj"])).len(), 3);
        assert_eq!(
            found(json!(["layers.1.mlp.down_proj"])),
            ["model.layers.1.mlp.down_proj"]
        );
        assert_eq!(found(json!("all-linear")).len(), 21);
        assert_eq!(found(json!(".*up_proj")), ["model.layers.1.mlp.up_proj"]);
        let narrowed = paths(json!(["q_proj"]), json!(null), json!([0, 2])).unwrap();
        assert_eq!(narrowed.len(), 2);
        assert_eq!(
            paths(json!(["q_proj"]), json!(null), json!(1))
                .unwrap()
                .len(),
            1
        );
        assert_eq!(
            paths(json!(["up_proj"]), json!(["x"]), json!(null))
                .unwrap()
                .len(),
            1
        );
    }

    #[test]
    fn what_cannot_be_adapted_is_refused() {
        for (targets, layers, reason) in [
            (json!(["q_proj", "lm_head"]), json!(null), "\"lm_head\""),
            (json!(["proj"]), json!(null), "\"proj\""),
            (json!([""]), json!(null), "\"\""),
            (json!([]), json!(null), "no map"),
            (json!([1]), json!(null), "no name"),
            (json!(null), json!(null), "missing"),
            (json!(["q_proj"]), json!([3]), "layer 3"),
            (json!(["q_proj"]), json!(-1), "-1"),
            (json!(["q_proj"]), json!([]), "no map"),
        ] {
            let error = paths(targets, json!(null), layers).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }
}
