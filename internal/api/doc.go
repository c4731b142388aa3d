// Package api is the control API: its schema (atoll.proto), the generated code,
// the server side over a Backend, and the client side that the command line
// uses. It carries commands and facts, never volume data.
//
// The API is served on a Unix socket, whose directory only the server's user
// can enter and where who says nothing is root, and on TCP, where every call but
// /healthz and /metrics needs root's token from the credential file or a user's name
// and password (caller.go). What users may do is the Backend's to say (Rights);
// the interceptor in server.go asks it before every call. Profiles are root's.
//
// The code in atollv1 is made by "make generate".
package api
