package nbd

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

const (
	// maxOptions is how many options one negotiation may have.
	maxOptions = 4096
	// maxQueries is how many contexts a client may ask for or get at once.
	maxQueries = 256
)

// errEnd ends a negotiation in good order.
var errEnd = errors.New("negotiation ended by the client")

// negotiation is the state that options build up. STARTTLS resets it (N5).
type negotiation struct {
	structured bool
	metaName   string   // the export that contexts were chosen for
	contexts   []string // chosen by SET_META_CONTEXT; the index is the id
}

// negotiate runs the handshake. When it returns nil, the connection is in the
// transmission phase with an open device.
func (c *conn) negotiate() error {
	defer c.nc.SetDeadline(time.Time{})
	if err := c.greet(); err != nil {
		return err
	}
	for range maxOptions {
		opt, data, err := c.readOption()
		if err != nil {
			return err
		}
		if c.s.draining.Load() && opt != optAbort {
			c.replyError(opt, repShut, "the server is shutting down")
			return fmt.Errorf("negotiate: %w", atoll.ErrClosed)
		}
		done, err := c.option(opt, data)
		if done || err != nil {
			return err
		}
	}
	return fmt.Errorf("negotiate: more than %d options: %w", maxOptions, atoll.ErrTooLarge)
}

// greet exchanges the magic numbers and the handshake flags.
func (c *conn) greet() error {
	var hello [18]byte
	binary.BigEndian.PutUint64(hello[0:], magicInit)
	binary.BigEndian.PutUint64(hello[8:], magicOption)
	binary.BigEndian.PutUint16(hello[16:], flagFixedNewstyle|flagNoZeroes)
	c.renewDeadline()
	if _, err := c.nc.Write(hello[:]); err != nil {
		return err
	}
	var flags [4]byte
	if _, err := io.ReadFull(c.nc, flags[:]); err != nil {
		return err
	}
	f := binary.BigEndian.Uint32(flags[:])
	if f&^uint32(flagFixedNewstyle|flagNoZeroes) != 0 {
		return fmt.Errorf("negotiate: unknown client flags %#x: %w", f, atoll.ErrInvalid)
	}
	if f&flagFixedNewstyle == 0 {
		return fmt.Errorf("negotiate: client is not fixed newstyle: %w", atoll.ErrUnsupported)
	}
	c.noZeroes = f&flagNoZeroes != 0
	return nil
}

// renewDeadline gives the client time for one more step.
func (c *conn) renewDeadline() {
	c.nc.SetDeadline(time.Now().Add(c.s.o.HandshakeTimeout))
}

// readOption reads one option. Data that are too long are skipped, answered and
// come back as nil with the option number 0, which option ignores.
func (c *conn) readOption() (opt uint32, data []byte, err error) {
	c.renewDeadline()
	var h [optionBytes]byte
	if _, err := io.ReadFull(c.nc, h[:]); err != nil {
		return 0, nil, err
	}
	if binary.BigEndian.Uint64(h[:]) != magicOption {
		return 0, nil, fmt.Errorf("negotiate: bad option magic: %w", atoll.ErrInvalid)
	}
	opt = binary.BigEndian.Uint32(h[8:])
	n := binary.BigEndian.Uint32(h[12:])
	if n <= maxOptionData {
		data = make([]byte, n)
		_, err = io.ReadFull(c.nc, data)
		return opt, data, err
	}
	if n > maxPayload || opt == optExportName {
		return 0, nil, fmt.Errorf("negotiate: option %d with %d bytes: %w", opt, n, atoll.ErrTooLarge)
	}
	if _, err := io.CopyN(io.Discard, c.nc, int64(n)); err != nil {
		return 0, nil, err
	}
	return 0, nil, c.replyError(opt, repTooBig, fmt.Sprintf("option data is longer than %d bytes", maxOptionData))
}

// option answers one option. done means that transmission begins.
func (c *conn) option(opt uint32, data []byte) (done bool, err error) {
	if c.tlsMode == TLSRequired && !c.tls && opt != optStartTLS && opt != optAbort && opt != 0 {
		if opt == optExportName {
			return false, fmt.Errorf("negotiate: EXPORT_NAME before STARTTLS: %w", atoll.ErrDenied)
		}
		return false, c.replyError(opt, repTLSReqd, "this server requires TLS: send STARTTLS first")
	}
	switch opt {
	case 0:
		return false, nil
	case optAbort:
		c.reply(opt, repAck, nil)
		return false, errEnd
	case optExportName:
		return c.optionExportName(data)
	case optInfo, optGo:
		return c.optionInfo(opt, data)
	case optList:
		return false, c.optionList(data)
	case optStartTLS:
		return false, c.optionStartTLS(data)
	case optStructuredReply:
		if len(data) > 0 {
			return false, c.replyError(opt, repInvalid, "STRUCTURED_REPLY takes no data")
		}
		c.neg.structured = true
		return false, c.reply(opt, repAck, nil)
	case optListMeta, optSetMeta:
		return false, c.optionMeta(opt, data)
	}
	return false, c.replyError(opt, repUnsup, fmt.Sprintf("option %d is not supported", opt))
}

// optionExportName answers the old way of choosing an export, which knows no
// error but to hang up.
func (c *conn) optionExportName(data []byte) (bool, error) {
	if len(data) > maxString {
		return false, fmt.Errorf("negotiate: export name of %d bytes: %w", len(data), atoll.ErrTooLarge)
	}
	info, err := c.open(string(data))
	if err != nil {
		return false, err
	}
	var out []byte
	out = binary.BigEndian.AppendUint64(out, uint64(info.Size))
	out = binary.BigEndian.AppendUint16(out, c.transmissionFlags(info))
	if !c.noZeroes {
		out = append(out, make([]byte, exportPadBytes)...)
	}
	if _, err := c.nc.Write(out); err != nil {
		return false, err
	}
	return true, nil
}

// optionInfo answers INFO and GO.
func (c *conn) optionInfo(opt uint32, data []byte) (done bool, err error) {
	req, ok := parseInfo(data)
	if !ok || strings.ContainsRune(req.name, 0) {
		return false, c.replyError(opt, repInvalid, "malformed request for an export")
	}
	var info Info
	if opt == optGo {
		info, err = c.open(req.name)
	} else {
		info, err = c.stat(req.name)
	}
	if err != nil {
		return false, c.replyFailure(opt, err)
	}
	if err := c.sendInfo(opt, req, info); err != nil {
		return false, err
	}
	return opt == optGo, c.reply(opt, repAck, nil)
}

// sendInfo sends the information about an export: what is mandatory and what
// was asked for. Unknown requests are ignored.
func (c *conn) sendInfo(opt uint32, req infoRequest, info Info) error {
	out := binary.BigEndian.AppendUint16(nil, infoExport)
	out = binary.BigEndian.AppendUint64(out, uint64(info.Size))
	out = binary.BigEndian.AppendUint16(out, c.transmissionFlags(info))
	if err := c.reply(opt, repInfo, out); err != nil {
		return err
	}
	var sent [4]bool
	for _, want := range req.wants {
		if want == infoExport || int(want) >= len(sent) || sent[want] {
			continue
		}
		sent[want] = true
		out = binary.BigEndian.AppendUint16(nil, want)
		switch want {
		case infoName:
			out = append(out, info.Name...)
		case infoDescription:
			if info.Description == "" {
				continue
			}
			out = append(out, info.Description...)
		case infoBlockSize:
			out = binary.BigEndian.AppendUint32(out, minBlock)
			out = binary.BigEndian.AppendUint32(out, preferredBlock)
			out = binary.BigEndian.AppendUint32(out, maxPayload)
		}
		if err := c.reply(opt, repInfo, out); err != nil {
			return err
		}
	}
	return nil
}

// transmissionFlags returns the flags of an export on this connection.
func (c *conn) transmissionFlags(info Info) uint16 {
	flags := uint16(flagsWritable)
	if info.ReadOnly {
		flags = flagsReadOnly
	}
	if c.neg.structured {
		flags |= flagDF
	}
	return flags
}

// optionList answers LIST with one reply for each export.
func (c *conn) optionList(data []byte) error {
	if len(data) > 0 {
		return c.replyError(optList, repInvalid, "LIST takes no data")
	}
	ctx, cancel := context.WithTimeout(c.ctx, c.s.o.OpenTimeout)
	defer cancel()
	all, err := c.s.o.Exports.List(ctx)
	if err != nil {
		return c.replyFailure(optList, err)
	}
	for _, e := range all {
		c.renewDeadline()
		out := append(appendString(nil, e.Name), e.Description...)
		if err := c.reply(optList, repServer, out); err != nil {
			return err
		}
	}
	return c.reply(optList, repAck, nil)
}

// optionStartTLS goes over to TLS and forgets what was negotiated (N5).
// Nothing was read ahead, so no plain text can slip in behind the upgrade.
func (c *conn) optionStartTLS(data []byte) error {
	switch {
	case len(data) > 0:
		return c.replyError(optStartTLS, repInvalid, "STARTTLS takes no data")
	case c.tls:
		return c.replyError(optStartTLS, repInvalid, "TLS is in use already")
	case c.tlsMode == TLSNone || c.s.o.TLS == nil:
		return c.replyError(optStartTLS, repPolicy, "TLS is not set up on this server")
	}
	if err := c.reply(optStartTLS, repAck, nil); err != nil {
		return err
	}
	tc := tls.Server(c.nc, c.s.o.TLS)
	ctx, cancel := context.WithTimeout(c.ctx, c.s.o.HandshakeTimeout)
	defer cancel()
	if err := tc.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("negotiate tls: %w", err)
	}
	c.upgrade(tc)
	return nil
}

// optionMeta answers LIST_META_CONTEXT and SET_META_CONTEXT. A SET replaces the
// one before even when it fails.
func (c *conn) optionMeta(opt uint32, data []byte) error {
	if opt == optSetMeta {
		c.neg.metaName, c.neg.contexts = "", nil
		if !c.neg.structured {
			return c.replyError(opt, repInvalid, "SET_META_CONTEXT needs STRUCTURED_REPLY first")
		}
	}
	req, ok := parseMeta(data)
	if !ok || len(req.queries) > maxQueries {
		return c.replyError(opt, repInvalid, "malformed request for metadata contexts")
	}
	if _, err := c.stat(req.name); err != nil {
		return c.replyFailure(opt, err)
	}
	all, err := c.contextsOf(req.name, req.queries, opt == optListMeta)
	if err != nil {
		return c.replyFailure(opt, err)
	}
	found := matchContexts(all, req.queries, opt == optListMeta)
	for i, name := range found {
		id := uint32(0)
		if opt == optSetMeta {
			id = uint32(i)
		}
		c.renewDeadline()
		if err := c.reply(opt, repMeta, append(binary.BigEndian.AppendUint32(nil, id), name...)); err != nil {
			return err
		}
	}
	if opt == optSetMeta {
		c.neg.metaName, c.neg.contexts = req.name, found
	}
	return c.reply(opt, repAck, nil)
}

// stat describes an export.
func (c *conn) stat(name string) (Info, error) {
	ctx, cancel := context.WithTimeout(c.ctx, c.s.o.OpenTimeout)
	defer cancel()
	info, err := c.s.o.Exports.Stat(ctx, name)
	if info.Name == "" {
		info.Name = name
	}
	c.renewDeadline()
	return info, err
}

// open opens an export for this connection, after the requests of connections
// that are gone have ended.
func (c *conn) open(name string) (Info, error) {
	ctx, cancel := context.WithTimeout(c.ctx, c.s.o.OpenTimeout)
	defer cancel()
	defer c.renewDeadline()
	dev, info, err := c.s.o.Exports.Open(ctx, name)
	if err != nil {
		return Info{}, err
	}
	if err := c.s.awaitGone(ctx, dev); err != nil {
		c.s.o.Exports.Release(dev)
		return Info{}, fmt.Errorf("open export %q: %w", name, err)
	}
	if info.Name == "" {
		info.Name = name
	}
	info.Size, info.ReadOnly = dev.Size(), info.ReadOnly || dev.ReadOnly()
	c.attach(name, dev, info)
	return info, nil
}

// replyFailure answers an option with what went wrong inside.
func (c *conn) replyFailure(opt uint32, err error) error {
	if ctxErr := c.ctx.Err(); ctxErr != nil {
		err = fmt.Errorf("shut down: %w", atoll.ErrClosed)
	}
	rep := optionError(err)
	return c.replyError(opt, rep, tagged(err, rep))
}

// replyError answers an option with an error and a text for people.
func (c *conn) replyError(opt, rep uint32, text string) error {
	return c.reply(opt, rep, []byte(text[:min(len(text), maxString)]))
}

// reply sends one reply to an option.
func (c *conn) reply(opt, rep uint32, data []byte) error {
	out := make([]byte, 0, optReplyBytes+len(data))
	out = binary.BigEndian.AppendUint64(out, magicOptReply)
	out = binary.BigEndian.AppendUint32(out, opt)
	out = binary.BigEndian.AppendUint32(out, rep)
	out = binary.BigEndian.AppendUint32(out, uint32(len(data)))
	_, err := c.nc.Write(append(out, data...))
	return err
}
