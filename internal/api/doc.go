// Package api is the control API: its schema (atoll.proto), the generated code,
// the server side over a Backend, and the client side that the command line
// uses. It carries commands and facts, never volume data.
//
// The API is served on a Unix socket, whose directory only the server's user
// can enter, and on TCP, where every call but /healthz and /metrics needs the
// bearer token from the credential file. Profiles are served on the Unix socket
// only.
//
// The code in atollv1 is made by "make generate".
package api
