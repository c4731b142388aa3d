package atoll

import "testing"

// An address that a server tells is used only if it means the same from here.
func TestReachable(t *testing.T) {
	here, far := &Client{local: true}, &Client{host: "10.1.2.3"}
	loop := &Client{local: true, host: "127.0.0.1"}
	for _, x := range []struct {
		c         *Client
		uri, want string
	}{
		{here, "nbd+unix:///disk?socket=/run/x", "nbd+unix:///disk?socket=/run/x"},
		{far, "nbd+unix:///disk?socket=/run/x", ""},
		{here, "nbd://127.0.0.1/disk", "nbd://127.0.0.1/disk"},
		{loop, "nbd://localhost:7/disk", "nbd://localhost:7/disk"},
		{far, "nbd://127.0.0.1/disk", ""}, {far, "nbd://localhost/disk", ""}, {far, "nbd://[::1]:9/disk", ""},
		{far, "nbds://0.0.0.0:9/disk", "nbds://10.1.2.3:9/disk"}, {far, "nbd://[::]/disk", "nbd://10.1.2.3/disk"},
		{here, "nbd://0.0.0.0:9/disk", "nbd://0.0.0.0:9/disk"},
		{far, "nbd://storage1/disk", "nbd://storage1/disk"}, {here, "nbd://storage1:5/disk", "nbd://storage1:5/disk"},
		{here, "http://x/", ""},
	} {
		a, ok := x.c.reachable(x.uri)
		if got := a.String(); ok != (x.want != "") || ok && got != x.want {
			t.Errorf("%s from %q (local %v): %q %v, want %q", x.uri, x.c.host, x.c.local, got, ok, x.want)
		}
	}
}
