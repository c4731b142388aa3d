package curve

import (
	"context"
	"net"
	"net/url"
	"strings"
)

// open tells where a volume's data are served, after making sure that they are.
// Curve's clients know no code but -2 for a refused open.
func (g *Gateway) open(ctx context.Context, in *call, out *reply) error {
	err := g.openFile(ctx, in, out)
	if err == nil || in.Precise || g.o.PreciseOpen {
		return err
	}
	if in.Owner == "" {
		return refuse(Exists, err.Error()) // -1, which there is Open's own failure
	}
	return refuse(Failed, err.Error())
}

func (g *Gateway) openFile(ctx context.Context, in *call, out *reply) error {
	n, err := g.enterFile(ctx, in)
	if err != nil {
		return err
	}
	if n.dir() || n.trash != nil {
		return refuse(NotSupport, in.Path+" is not a volume that can be opened")
	}
	v, err := g.b.Volume(ctx, n.path, true)
	if err != nil {
		return err
	}
	out.URLs = reachable(v.Urls, in)
	if len(out.URLs) == 0 {
		return refuse(NotSupport, "the server has no address for data that this client can reach; see its setting nbd")
	}
	out.Length = v.SizeBytes
	out.Session = g.mounts.add(n.entry.Id)
	return nil
}

// reachable picks the addresses that the client can use: Unix sockets only on
// this machine, and for a server that listens everywhere the name under which
// the client found it.
func reachable(urls []string, in *call) []string {
	var out []string
	for _, u := range urls {
		p, err := url.Parse(u)
		if err != nil {
			continue
		}
		if strings.Contains(p.Scheme, "+unix") {
			if in.local {
				out = append(out, u)
			}
			continue
		}
		ip := net.ParseIP(p.Hostname())
		switch {
		case p.Hostname() == "" || ip != nil && ip.IsUnspecified():
			p.Host = withHost(in.host, p.Port())
		case ip != nil && ip.IsLoopback() && !in.local:
			continue
		}
		out = append(out, p.String())
	}
	return out
}

// withHost joins the host of an HTTP request with a port.
func withHost(host, port string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	if host = strings.Trim(host, "[]"); port == "" {
		port = "10809"
	}
	return net.JoinHostPort(host, port)
}

// close forgets a session. One that is not known is none.
func (g *Gateway) close(_ context.Context, in *call, _ *reply) error {
	g.mounts.remove(in.Session)
	return nil
}
