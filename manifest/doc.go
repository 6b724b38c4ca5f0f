// Package manifest reads the files people write about pipelines and turns them
// into the PipelineConfig the router takes. It is a package of its own, and not
// part of the pipeline command, because the demo cluster applies the same files
// and because its golden tests are the contract with existing files.
//
// Two forms are read, from YAML or JSON files, several documents to a file:
//
//   - The resources Source, Transform, Sink and Pipeline of the original CLI and
//     of the Kubernetes resources. A Pipeline becomes the same PipelineConfig
//     the operator makes of it. Their unknown fields are warnings, as existing
//     files carry some.
//   - The whole PipelineConfig, with edges, conditions and selectors: a document
//     of kind PipelineConfig or one with stages. Its field names are those of
//     the API's JSON form, and it is read strictly.
//
// Every fault is reported with file and line, and all of them at once.
package manifest
