package nbd

import (
	"fmt"
	"net"
	"net/url"
	"strings"

	"github.com/atollstore/atoll/internal/atoll"
)

// DefaultPort is where NBD servers listen.
const DefaultPort = "10809"

// Address is a parsed NBD URI:
//
//	nbd://host[:port]/export            nbds://host[:port]/export
//	nbd+unix:///export?socket=/path     nbds+unix:///export?socket=/path
type Address struct {
	Network string // "tcp" or "unix"
	Addr    string // "host:port" or a path
	TLS     bool   // nbds: TLS or nothing
	Export  string
}

// ParseURI takes an NBD URI apart; ErrInvalid tells what is wrong with it.
func ParseURI(uri string) (Address, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return Address{}, fmt.Errorf("parse nbd uri %q: %w: %w", uri, atoll.ErrInvalid, err)
	}
	a := Address{Export: strings.TrimPrefix(u.Path, "/")}
	scheme, transport, _ := strings.Cut(u.Scheme, "+")
	a.TLS = scheme == "nbds"
	switch {
	case scheme != "nbd" && scheme != "nbds":
		err = fmt.Errorf("scheme is not nbd or nbds")
	case transport == "unix":
		a.Network, a.Addr = "unix", u.Query().Get("socket")
		if a.Addr == "" {
			err = fmt.Errorf("no ?socket= with a path")
		} else if u.Host != "" {
			err = fmt.Errorf("a host and a socket (write nbd+unix:///name with three slashes)")
		}
	case transport == "" || transport == "tcp":
		host, port := u.Hostname(), u.Port()
		if host == "" {
			host = "localhost"
		}
		if port == "" {
			port = DefaultPort
		}
		a.Network, a.Addr = "tcp", net.JoinHostPort(host, port)
	default:
		err = fmt.Errorf("transport %q is not unix or tcp", transport)
	}
	if err == nil && len(a.Export) > maxString {
		err = fmt.Errorf("export name is longer than %d bytes", maxString)
	}
	if err != nil {
		return Address{}, fmt.Errorf("parse nbd uri %q: %w: %w", uri, err, atoll.ErrInvalid)
	}
	return a, nil
}

// String is the inverse of ParseURI.
func (a Address) String() string {
	scheme, path := "nbd", (&url.URL{Path: "/" + a.Export}).EscapedPath()
	if a.TLS {
		scheme = "nbds"
	}
	if a.Network != "unix" {
		return scheme + "://" + strings.TrimSuffix(a.Addr, ":"+DefaultPort) + path
	}
	socket := strings.ReplaceAll(url.QueryEscape(a.Addr), "+", "%20")
	return scheme + "+unix://" + path + "?socket=" + strings.ReplaceAll(socket, "%2F", "/")
}
