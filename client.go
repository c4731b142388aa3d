package atoll

import (
	"context"
	"crypto/tls"
	"fmt"
	"iter"
	"net"
	"net/url"
	"os"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/pki"
)

// Options says which cluster to connect to, and how. The zero Options are for
// the environment's cluster: $ATOLL_SERVER, or the server that runs here.
type Options struct {
	// Server is "unix:/path", "host:port" or "https://host:port". If it is empty,
	// $ATOLL_SERVER, and else the socket of the server that runs here.
	Server string
	// Credential is needed over TCP. If it is empty, $ATOLL_TOKEN or what is in
	// the file $ATOLL_TOKEN_FILE.
	Credential string
	// User acts as that user, with its rights, instead of root. If it is empty,
	// $ATOLL_USER and $ATOLL_PASSWORD.
	User, Password string
	// TLS replaces the settings of https and nbds connections. Without it https
	// trusts the authority that the credential names, if it names one.
	TLS *tls.Config
	// Connections is how many connections each open volume uses (2).
	Connections int
	// RetryFor is how long a read, write or flush is tried again when its
	// connection breaks (30 s).
	RetryFor time.Duration
}

// Client talks to a cluster.
type Client struct {
	api   *api.Client
	o     Options
	host  string // of the server; empty on a Unix socket
	local bool   // the server is on this machine
}

// Dial connects to a cluster. It fails with ErrUnreachable if no server answers
// and with ErrDenied if that does not take the credential.
func Dial(ctx context.Context, o Options) (*Client, error) {
	if err := o.complete(); err != nil {
		return nil, err
	}
	conf := o.TLS
	if parts := strings.Split(o.Credential, ":"); conf == nil && len(parts) == 3 && strings.HasPrefix(o.Server, "https://") {
		conf = pki.PinnedTLS(parts[1], nil) // "atoll1:HASH:SECRET"
	}
	a, err := api.NewClient(o.Server, api.Credential{Token: o.Credential, User: o.User, Password: o.Password}, conf)
	if err != nil {
		return nil, err
	}
	c := &Client{api: a, o: o, local: strings.HasPrefix(o.Server, "unix:")}
	if !c.local {
		c.host = hostOf(o.Server)
		c.local = isLoopback(c.host)
	}
	if _, err := a.Cluster.GetStatus(ctx, connect.NewRequest(&atollv1.GetStatusRequest{})); err != nil {
		a.Close()
		return nil, fmt.Errorf("connect to %s: %w", o.Server, err)
	}
	return c, nil
}

// complete takes what is missing from the environment.
func (o *Options) complete() error {
	if o.Connections <= 0 {
		o.Connections = 2
	}
	if o.RetryFor <= 0 {
		o.RetryFor = 30 * time.Second
	}
	if o.Server == "" {
		o.Server = os.Getenv("ATOLL_SERVER")
	}
	if o.Server == "" {
		if _, err := os.Stat(api.DefaultSocket()); err != nil {
			return fmt.Errorf("no server runs here (%s is not there): %w", api.DefaultSocket(), ErrUnreachable)
		}
		if err := api.CheckPrivate(api.RuntimeDir()); err != nil {
			return err
		}
		o.Server = "unix:" + api.DefaultSocket()
	}
	if o.User == "" {
		o.User, o.Password = os.Getenv("ATOLL_USER"), os.Getenv("ATOLL_PASSWORD")
	}
	if o.Credential == "" {
		o.Credential = os.Getenv("ATOLL_TOKEN")
	}
	if file := os.Getenv("ATOLL_TOKEN_FILE"); o.Credential == "" && file != "" {
		text, err := os.ReadFile(file)
		if err != nil {
			return fmt.Errorf("read credential: %v: %w", err, ErrInvalid)
		}
		o.Credential = strings.TrimSpace(string(text))
	}
	return nil
}

// hostOf returns the host of "host:port" or a URL.
func hostOf(server string) string {
	if u, err := url.Parse(server); err == nil && u.Host != "" {
		return u.Hostname()
	}
	host, _, err := net.SplitHostPort(server)
	if err != nil {
		return server
	}
	return host
}

// isLoopback reports whether a host is this machine.
func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// Close drops idle connections. Open volumes stay open.
func (c *Client) Close() error {
	c.api.Close()
	return nil
}

// VolumeInfo describes a volume.
type VolumeInfo struct {
	Name        string
	Size        int64
	Replicas    int
	Cache       string // writeback or writethrough
	Owner       string
	Description string
	Created     time.Time
	Parent      string // NAME@VERSION that it is a clone of, if it is one
	Versions    int
	Last        uint64 // number of the newest version, 0 if there is none
	Release     uint64 // number of the released version, 0 if there is none
	URLs        []string
	Properties  map[string]string
}

func volumeInfo(v *atollv1.Volume) VolumeInfo {
	return VolumeInfo{
		Name: v.Name, Size: v.SizeBytes, Replicas: int(v.Replicas), Cache: v.Cache, Owner: v.Owner, Description: v.Description,
		Created: v.Created.AsTime(), Parent: v.Parent, Versions: int(v.GetVersions()), Last: v.GetLast(), Release: v.GetRelease(),
		URLs: v.Urls, Properties: v.Properties,
	}
}

// CreateOptions are what a new volume may have.
type CreateOptions struct {
	Replicas    int    // copies; 0 is the cluster's default
	Cache       string // "writeback" (the default) or "writethrough"
	Description string
	Owner       string
	Properties  map[string]string // free
}

// Create makes a volume that reads as zeros. It takes room only as it is
// written. size is a multiple of 4 KiB. ErrExist if the name is taken. o may be
// nil.
func (c *Client) Create(ctx context.Context, name string, size int64, o *CreateOptions) (VolumeInfo, error) {
	if o == nil {
		o = &CreateOptions{}
	}
	resp, err := c.api.Volumes.CreateVolume(ctx, connect.NewRequest(&atollv1.CreateVolumeRequest{
		Name: name, SizeBytes: size, Replicas: int32(o.Replicas), Cache: o.Cache, Description: o.Description,
		Owner: o.Owner, Properties: o.Properties,
	}))
	if err != nil {
		return VolumeInfo{}, err
	}
	return volumeInfo(resp.Msg), nil
}

// Stat describes a volume; ErrNotExist if there is none of that name.
func (c *Client) Stat(ctx context.Context, name string) (VolumeInfo, error) {
	resp, err := c.api.Volumes.GetVolume(ctx, connect.NewRequest(&atollv1.GetVolumeRequest{Name: name}))
	if err != nil {
		return VolumeInfo{}, err
	}
	return volumeInfo(resp.Msg), nil
}

// List yields all volumes by name. An error is the last thing it yields.
func (c *Client) List(ctx context.Context) iter.Seq2[VolumeInfo, error] {
	return func(yield func(VolumeInfo, error) bool) {
		for after := ""; ; {
			resp, err := c.api.Volumes.ListVolumes(ctx, connect.NewRequest(&atollv1.ListVolumesRequest{After: after, Limit: 1000}))
			if err != nil {
				yield(VolumeInfo{}, err)
				return
			}
			for _, v := range resp.Msg.Volumes {
				if !yield(volumeInfo(v), nil) {
					return
				}
			}
			if after = resp.Msg.Next; after == "" {
				return
			}
		}
	}
}

// Resize changes the size of a volume. To make one smaller shrink must be set;
// what lies beyond the new end is then lost, but for the versions.
func (c *Client) Resize(ctx context.Context, name string, size int64, shrink bool) (VolumeInfo, error) {
	resp, err := c.api.Volumes.ResizeVolume(ctx, connect.NewRequest(&atollv1.ResizeVolumeRequest{Name: name, SizeBytes: size, Shrink: shrink}))
	if err != nil {
		return VolumeInfo{}, err
	}
	return volumeInfo(resp.Msg), nil
}

// Rename gives a volume another name; ErrExist if that is taken.
func (c *Client) Rename(ctx context.Context, from, to string) error {
	_, err := c.api.Names.Rename(ctx, connect.NewRequest(&atollv1.RenameRequest{From: from, To: to}))
	return err
}

// Remove moves a volume with its versions to the trash, from which it can be
// taken back for a while; with now it is gone for good. ErrBusy while it is in
// use.
func (c *Client) Remove(ctx context.Context, name string, now bool) error {
	_, err := c.api.Volumes.DeleteVolume(ctx, connect.NewRequest(&atollv1.DeleteVolumeRequest{Name: name, Now: now}))
	return err
}
