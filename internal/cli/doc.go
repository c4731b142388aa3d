// Package cli is the command line: one file per family of commands. It talks to
// a server through the control API and, for a volume's data, through NBD; it
// knows nothing of how the server works.
//
// Rules that all commands keep: standard output carries the result and nothing
// else; progress, hints and warnings go to standard error; -o json gives one
// document whose fields are the API's; a failed command says what happened, why,
// and what to do, and ends with one of the documented exit codes.
package cli
