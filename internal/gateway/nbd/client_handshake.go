package nbd

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// DialOptions configures the client side.
type DialOptions struct {
	// TLS is used with nbds URIs; nil means the system's roots and the URI's
	// host name.
	TLS *tls.Config
	// Contexts are metadata contexts to ask for besides base:allocation. Those
	// that the export does not have are left out (see Client.Contexts).
	Contexts []string
	// NoStructured keeps to simple replies, as the Linux kernel does.
	NoStructured bool
	// DialContext replaces the way connections are made, for tests.
	DialContext func(ctx context.Context, network, addr string) (net.Conn, error)
}

// Blocks tells the sizes of requests that a server likes, in bytes.
type Blocks struct{ Min, Preferred, Max int }

// proposal is what a negotiation came to.
type proposal struct {
	size       int64
	flags      uint16
	blocks     Blocks
	structured bool
	contexts   map[string]uint32 // the ids of the contexts that were chosen
	text       string            // description
}

// dialer negotiates over one connection.
type dialer struct {
	nc   net.Conn
	addr Address
	o    DialOptions
}

// connect makes a connection, exchanges greetings and goes over to TLS if the
// address wants it. The context bounds the whole negotiation.
func connect(ctx context.Context, addr Address, o DialOptions) (*dialer, error) {
	dial := o.DialContext
	if dial == nil {
		var nd net.Dialer
		dial = nd.DialContext
	}
	nc, err := dial(ctx, addr.Network, addr.Addr)
	if err != nil {
		return nil, fmt.Errorf("connect to %v: %w: %w", addr, atoll.ErrUnreachable, err)
	}
	if u, ok := nc.(*net.UnixConn); ok {
		u.SetReadBuffer(socketBytes)
		u.SetWriteBuffer(socketBytes)
	}
	d := &dialer{nc: nc, addr: addr, o: o}
	defer d.guard(ctx)()
	err = d.greet()
	if err == nil && addr.TLS {
		err = d.startTLS(ctx)
	}
	if err != nil {
		nc.Close()
		return nil, d.wrap(ctx, err)
	}
	return d, nil
}

// guard makes the end of ctx end the negotiation; the returned function undoes
// it.
func (d *dialer) guard(ctx context.Context) func() {
	raw := d.nc
	stop := context.AfterFunc(ctx, func() { raw.SetDeadline(time.Unix(1, 0)) })
	return func() { stop() }
}

// wrap names the address in an error and prefers the context's reason.
func (d *dialer) wrap(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		err = ctxError(ctx.Err())
	} else if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = fmt.Errorf("server hung up: %w: %w", atoll.ErrUnreachable, err)
	}
	return fmt.Errorf("negotiate with %v: %w", d.addr, err)
}

// greet exchanges magic numbers and flags.
func (d *dialer) greet() error {
	var hello [18]byte
	if _, err := io.ReadFull(d.nc, hello[:]); err != nil {
		return err
	}
	flags := binary.BigEndian.Uint16(hello[16:])
	if binary.BigEndian.Uint64(hello[:]) != magicInit || binary.BigEndian.Uint64(hello[8:]) != magicOption {
		return fmt.Errorf("not an NBD server of the fixed newstyle: %w", atoll.ErrInvalid)
	}
	if flags&flagFixedNewstyle == 0 {
		return fmt.Errorf("server is not fixed newstyle: %w", atoll.ErrUnsupported)
	}
	var out [4]byte
	binary.BigEndian.PutUint32(out[:], uint32(flags&(flagFixedNewstyle|flagNoZeroes)))
	_, err := d.nc.Write(out[:])
	return err
}

// send sends one option.
func (d *dialer) send(opt uint32, data []byte) error {
	out := binary.BigEndian.AppendUint64(nil, magicOption)
	out = binary.BigEndian.AppendUint32(out, opt)
	out = binary.BigEndian.AppendUint32(out, uint32(len(data)))
	_, err := d.nc.Write(append(out, data...))
	return err
}

// receive reads one reply to opt. An error reply comes back as *ServerError.
func (d *dialer) receive(opt uint32) (rep uint32, data []byte, err error) {
	var h [optReplyBytes]byte
	if _, err := io.ReadFull(d.nc, h[:]); err != nil {
		return 0, nil, err
	}
	rep = binary.BigEndian.Uint32(h[12:])
	n := binary.BigEndian.Uint32(h[16:])
	if binary.BigEndian.Uint64(h[:]) != magicOptReply || binary.BigEndian.Uint32(h[8:]) != opt || n > maxOptionData {
		return 0, nil, fmt.Errorf("malformed reply to option %d: %w", opt, atoll.ErrInvalid)
	}
	data = make([]byte, n)
	if _, err := io.ReadFull(d.nc, data); err != nil {
		return 0, nil, err
	}
	if rep&repErr != 0 {
		return rep, nil, newServerError(d.asked(opt), rep, string(data))
	}
	return rep, data, nil
}

// asked names an option for an error.
func (d *dialer) asked(opt uint32) string {
	switch opt {
	case optGo:
		return fmt.Sprintf("open export %q", d.addr.Export)
	case optList:
		return "list exports"
	case optStartTLS:
		return "start tls"
	case optListMeta, optSetMeta:
		return fmt.Sprintf("metadata contexts of export %q", d.addr.Export)
	}
	return fmt.Sprintf("option %d", opt)
}

// startTLS goes over to TLS.
func (d *dialer) startTLS(ctx context.Context) error {
	if err := d.send(optStartTLS, nil); err != nil {
		return err
	}
	if _, _, err := d.receive(optStartTLS); err != nil {
		return err
	}
	conf := &tls.Config{}
	if d.o.TLS != nil {
		conf = d.o.TLS.Clone()
	}
	if host, _, err := net.SplitHostPort(d.addr.Addr); err == nil && conf.ServerName == "" {
		conf.ServerName = host
	}
	conf.MinVersion = max(conf.MinVersion, tls.VersionTLS12)
	tc := tls.Client(d.nc, conf)
	if err := tc.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("tls: %w: %w", atoll.ErrDenied, err)
	}
	d.nc = tc
	return nil
}

// list asks for the exports.
func (d *dialer) list() (all []ExportInfo, err error) {
	if err := d.send(optList, nil); err != nil {
		return nil, err
	}
	for {
		rep, data, err := d.receive(optList)
		if err != nil || rep == repAck {
			return all, err
		}
		name, rest, ok := cutString(data)
		if rep != repServer || !ok {
			return nil, fmt.Errorf("malformed list of exports: %w", atoll.ErrInvalid)
		}
		all = append(all, ExportInfo{Name: name, Description: string(rest)})
	}
}

// choose negotiates structured replies, block status and the export.
func (d *dialer) choose() (p proposal, err error) {
	p.blocks = Blocks{Min: 1, Preferred: preferredBlock, Max: maxPayload}
	if !d.o.NoStructured {
		if p.structured, err = d.ask(optStructuredReply, nil, nil); err != nil {
			return p, err
		}
	}
	if p.structured {
		if err = d.setContexts(&p); err != nil {
			return p, err
		}
	}
	return p, d.goExport(&p)
}

// setContexts chooses base:allocation and the contexts that the caller wants. A
// server that refuses is one without contexts.
func (d *dialer) setContexts(p *proposal) error {
	p.contexts = map[string]uint32{}
	ok, err := d.ask(optSetMeta, d.metaBody(append([]string{ContextAllocation}, d.o.Contexts...)), func(rep uint32, data []byte) error {
		if rep != repMeta || len(data) < 4 || len(p.contexts) > len(d.o.Contexts) {
			return fmt.Errorf("malformed metadata context: %w", atoll.ErrInvalid)
		}
		p.contexts[string(data[4:])] = binary.BigEndian.Uint32(data)
		return nil
	})
	if !ok {
		clear(p.contexts)
	}
	return err
}

// metaBody encodes a request for the contexts of the address's export.
func (d *dialer) metaBody(queries []string) []byte {
	body := binary.BigEndian.AppendUint32(appendString(nil, d.addr.Export), uint32(len(queries)))
	for _, q := range queries {
		body = appendString(body, q)
	}
	return body
}

// ask sends an option that the server may refuse and reports whether it did not.
func (d *dialer) ask(opt uint32, data []byte, each func(rep uint32, data []byte) error) (bool, error) {
	if err := d.send(opt, data); err != nil {
		return false, err
	}
	for {
		rep, data, err := d.receive(opt)
		var refused *ServerError
		switch {
		case errors.As(err, &refused):
			return false, nil
		case err != nil:
			return false, err
		case rep == repAck:
			return true, nil
		case each == nil:
			return false, fmt.Errorf("unexpected reply %d to option %d: %w", rep, opt, atoll.ErrInvalid)
		}
		if err := each(rep, data); err != nil {
			return false, err
		}
	}
}

// goExport enters the transmission phase.
func (d *dialer) goExport(p *proposal) error {
	body := appendString(nil, d.addr.Export)
	body = binary.BigEndian.AppendUint16(body, 2)
	body = binary.BigEndian.AppendUint16(body, infoDescription)
	body = binary.BigEndian.AppendUint16(body, infoBlockSize)
	if err := d.send(optGo, body); err != nil {
		return err
	}
	told := false
	for {
		rep, data, err := d.receive(optGo)
		if err != nil {
			return err
		}
		if rep == repAck {
			if !told {
				return fmt.Errorf("server tells no size: %w", atoll.ErrInvalid)
			}
			return nil
		}
		if rep != repInfo || len(data) < 2 {
			return fmt.Errorf("malformed reply %d to GO: %w", rep, atoll.ErrInvalid)
		}
		if err := p.info(data, &told); err != nil {
			return err
		}
	}
}

// info takes in one piece of information about the export.
func (p *proposal) info(data []byte, told *bool) error {
	kind, data := binary.BigEndian.Uint16(data), data[2:]
	switch {
	case kind == infoExport && len(data) == 10:
		p.size, p.flags = int64(binary.BigEndian.Uint64(data)), binary.BigEndian.Uint16(data[8:])
		*told = true
		if p.size < 0 {
			return fmt.Errorf("server tells a size of %d: %w", uint64(p.size), atoll.ErrTooLarge)
		}
	case kind == infoBlockSize && len(data) == 12:
		low, best, high := binary.BigEndian.Uint32(data), binary.BigEndian.Uint32(data[4:]), binary.BigEndian.Uint32(data[8:])
		if low == 0 || low > 64<<10 || low&(low-1) != 0 || best < low || high < best && high < maxPayload {
			return fmt.Errorf("server tells block sizes %d, %d, %d: %w", low, best, high, atoll.ErrInvalid)
		}
		p.blocks = Blocks{Min: int(low), Preferred: int(min(best, maxPayload)), Max: int(min(high, maxPayload) / low * low)}
	case kind == infoDescription:
		p.text = string(data)
	case kind == infoExport || kind == infoBlockSize:
		return fmt.Errorf("malformed information %d: %w", kind, atoll.ErrInvalid)
	}
	return nil
}

// List returns the exports of the server at uri, whose export name is ignored.
func List(ctx context.Context, uri string, o DialOptions) ([]ExportInfo, error) {
	addr, err := ParseURI(uri)
	if err != nil {
		return nil, err
	}
	addr.Export = ""
	d, err := connect(ctx, addr, o)
	if err != nil {
		return nil, err
	}
	defer d.nc.Close()
	defer d.guard(ctx)()
	all, err := d.list()
	if err != nil {
		return nil, d.wrap(ctx, err)
	}
	d.send(optAbort, nil) // a courtesy; the list is here
	return all, nil
}

// ListContexts returns the metadata contexts of the export at uri that match
// the queries (all if there are none; "qemu:dirty-bitmap:" gives all dirty
// bitmaps). ErrNotExist if there is no such export.
func ListContexts(ctx context.Context, uri string, o DialOptions, queries ...string) (all []string, err error) {
	addr, err := ParseURI(uri)
	if err != nil {
		return nil, err
	}
	d, err := connect(ctx, addr, o)
	if err != nil {
		return nil, err
	}
	defer d.nc.Close()
	defer d.guard(ctx)()
	if _, err = d.ask(optStructuredReply, nil, nil); err == nil {
		all, err = d.listContexts(queries)
	}
	if err != nil {
		return nil, d.wrap(ctx, err)
	}
	d.send(optAbort, nil) // a courtesy; the list is here
	return all, nil
}

// listContexts asks for the names of contexts.
func (d *dialer) listContexts(queries []string) (all []string, err error) {
	if err := d.send(optListMeta, d.metaBody(queries)); err != nil {
		return nil, err
	}
	for {
		rep, data, err := d.receive(optListMeta)
		if err != nil || rep == repAck {
			return all, err
		}
		if rep != repMeta || len(data) < 4 {
			return nil, fmt.Errorf("malformed metadata context: %w", atoll.ErrInvalid)
		}
		all = append(all, string(data[4:]))
	}
}
